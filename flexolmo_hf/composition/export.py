"""Exporting: a checkpoint for software that knows neither names nor sets; the experts left out are not in its files.

Tensors are mapped from file to file, so the memory needed is that of the router's matrices, not of the model. Low-rank
and narrow experts are written with full matrices, which are made file by file.
"""

import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import Olmo2Config
from transformers.models.flex_olmo import FlexOlmoConfig as StockConfig

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.composition.compress import full_matrix
from flexolmo_hf.composition.reader import CheckpointReader, non_weight_files
from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert import MATRICES
from flexolmo_hf.modeling.files.layout import Deferred, bytes_of, write_weights
from flexolmo_hf.modeling.low_rank import tensor_shapes
from flexolmo_hf.modeling.names import parse_expert_set


def export_checkpoint(
    checkpoint: str | os.PathLike,
    output_dir: str | os.PathLike,
    *,
    active_experts: str | Iterable[str] | None = None,
    drop_bias: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a checkpoint that stock transformers and vLLM compute as this package computes the chosen experts.

    The other experts are left out of the files: their matrices, router rows and names.

    Args:
        checkpoint: A FlexOlmo checkpoint: folder or Hub repository.
        output_dir: A folder that does not exist yet or is empty.
        active_experts: The experts to keep, as names or as one string (``"public,math"``, ``"public+math"``); None for
            those that a plain load makes active. They keep their order and are numbered anew.
        drop_bias: Whether to leave the router biases out; stock software does not read them.
        max_shard_size: Largest weight file; each expert has files of its own.

    Returns:
        `output_dir` as a path. The folder holds the weights, a stock ``config.json`` and the checkpoint's tokenizer.
        The names stay in ``config.json``, where stock software passes over them.

    Raises:
        ConfigurationError: If the router has biases and `drop_bias` is not given.
        UnknownExpertError, DuplicateExpertError, EmptyExpertSetError, ExpertTypeError: If the set makes no sense.
        NotFlexOlmoError: If the checkpoint is of another architecture, a dense OLMo-2 model included.
        DamagedFileError, IncompleteCheckpointError, UnexpectedTensorError, NonFiniteTensorError: If the checkpoint
            cannot be trusted.
        OutputFolderNotEmptyError, OutputPlaceError, NoSpaceError: If the output has no place.
    """
    refuse_nonempty(output_dir)
    reader = CheckpointReader(checkpoint)
    if reader.is_dense:
        raise NotFlexOlmoError(Olmo2Config.model_type)
    kept = _kept_experts(active_experts, reader)
    if reader.config.router_bias and not drop_bias:
        _refuse_bias(reader, kept)
    tensors: dict[str, torch.Tensor | Deferred] = {**_shared_tensors(reader, kept), **_expert_tensors(reader, kept)}
    with new_folder(output_dir, needed_bytes=bytes_of(tensors)) as partial:
        write_weights(partial, tensors, kept, max_shard_size, whose="the checkpoint")
        stock_config(reader.config, kept).save_pretrained(partial)
        for file in non_weight_files(reader.folder):
            shutil.copyfile(file, partial / file.name)
    return Path(output_dir)


def stock_config(config: FlexOlmoConfig, kept: list[str]) -> StockConfig:
    """Make the stock configuration of a checkpoint that has only these experts.

    Args:
        config: The whole checkpoint's.
        kept: Names of the experts that remain, in checkpoint order.

    Returns:
        Upstream's fields and, as the one more that upstream carries along unread, ``expert_names``.
    """
    known = StockConfig.__dataclass_fields__
    settings = {key: value for key, value in config.to_dict().items() if key in known}
    settings |= {
        "architectures": ["FlexOlmoForCausalLM"],
        "num_experts": len(kept),
        "num_experts_per_tok": min(config.num_experts_per_tok, len(kept)),
    }
    return StockConfig(**settings, expert_names=kept)


def _kept_experts(chosen: str | Iterable[str] | None, reader: CheckpointReader) -> list[str]:
    if chosen is None:
        # Stock software knows no set in force: an expert that was switched off would come back.
        return list(reader.active_experts)
    if isinstance(chosen, str):
        chosen = [name.strip() for name in re.split("[,+]", chosen)] if chosen.strip() else []
    return parse_expert_set(chosen, reader.config.expert_names)


def _refuse_bias(reader: CheckpointReader, kept: list[str]) -> None:
    indices = [reader.config.expert_names.index(name) for name in kept]
    layers = range(reader.config.num_hidden_layers)
    biases = [reader.tensor(f"model.layers.{layer}.mlp.gate.bias")[indices].float() for layer in layers]
    # Means over layers, as `flexolmo inspect` shows them.
    means = torch.stack(biases).clamp(max=0).mean(dim=0).tolist()
    shown = ", ".join(f"{name} {mean:.3f}" for name, mean in zip(kept, means, strict=True))
    raise ConfigurationError(
        f"This checkpoint has router biases ({shown}), which stock transformers and vLLM do not read. "
        "Without them, the experts held back by a negative bias get more of every token, so the outputs change.",
        "Leave the biases out knowingly with drop_bias=True (--drop-bias) and measure the result, "
        "or serve the checkpoint as it is with flexolmo_hf.",
    )


def _shared_tensors(reader: CheckpointReader, kept: list[str]) -> dict[str, torch.Tensor]:
    indices = [reader.config.expert_names.index(name) for name in kept]
    shared = {name: reader.tensor(name) for name in reader.file_of if ".mlp." not in name}
    for layer in range(reader.config.num_hidden_layers):
        name = f"model.layers.{layer}.mlp.gate.weight"
        # A list of indices copies the rows: a slice would be a view of all of them.
        shared[name] = reader.tensor(name)[indices]
    return shared


def _expert_tensors(reader: CheckpointReader, kept: list[str]) -> dict[str, torch.Tensor | Deferred]:
    tensors: dict[str, torch.Tensor | Deferred] = {}
    for new, name in enumerate(kept):
        for layer in range(reader.config.num_hidden_layers):
            experts = f"model.layers.{layer}.mlp.experts"
            for matrix in MATRICES:
                tensors[f"{experts}.{new}.{matrix}"] = _matrix(reader, layer, name, matrix)
    return tensors


def _matrix(reader: CheckpointReader, layer: int, expert: str, matrix: str) -> torch.Tensor | Deferred:
    config, experts = reader.config, f"model.layers.{layer}.mlp.experts"
    index, form = config.expert_names.index(expert), config.expert_forms.get(expert, {})

    def own(name: str) -> torch.Tensor:
        return reader.tensor(f"{experts}.{index}.{name}")

    def public() -> torch.Tensor:
        return reader.tensor(f"{experts}.0.{matrix}")

    if not form:
        return own(matrix)
    shape = tensor_shapes(config.hidden_size, config.intermediate_size)[matrix]
    stored = own(next(iter(tensor_shapes(config.hidden_size, config.intermediate_size, form))))
    like = torch.empty(shape, dtype=stored.dtype, device="meta")
    return Deferred(like, lambda: full_matrix(matrix, form, config.intermediate_size, own, public))
