"""Dense models as experts: their feed-forward networks are put side by side in one FlexOlmo checkpoint.

Tensors are mapped from the dense checkpoints into the output, one file at a time; averages are made one tensor at a
time. Shape letters: E experts, H hidden.
"""

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.composition.fingerprint import anchor_settings
from flexolmo_hf.composition.reader import CheckpointReader, non_weight_files
from flexolmo_hf.errors import AnchorMismatchError, ConfigurationError, EmptyExpertSetError, NotOlmo2Error
from flexolmo_hf.evaluation.baselines.loading import tokenizers_differ
from flexolmo_hf.evaluation.baselines.rows import starting_rows
from flexolmo_hf.evaluation.baselines.soup import weighted_mean
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.files.layout import Deferred, bytes_of, write_weights
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name

#: Gives a shared tensor of the combined model by its name, from all its parts.
Shared = Callable[[str, Mapping[str, CheckpointReader]], torch.Tensor]


@dataclass(frozen=True)
class RouterStart:
    """How the router of a mixture of dense models starts.

    Args:
        embeddings: Rows by expert, ``"public"`` included; None draws small random ones.
        seed: Of random rows.
        experts_per_token: How many experts each token uses; None for all.
    """

    embeddings: Mapping[str, Any] | None = None
    seed: int = 0
    experts_per_token: int | None = None


def of_anchor(name: str, parts: Mapping[str, CheckpointReader]) -> torch.Tensor:
    """Return the anchor's own tensor."""
    return parts[PUBLIC].tensor(name)


def mean_of_all(name: str, parts: Mapping[str, CheckpointReader]) -> torch.Tensor:
    """Return the mean over the anchor and all dense models, in the anchor's dtype; equal tensors keep their bits."""
    first, *others = (reader.tensor(name) for reader in parts.values())
    return weighted_mean(first, others, [1 / len(parts)] * len(others))


def combine(
    anchor: str | os.PathLike,
    experts: Mapping[str, str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    shared: Shared,
    start: RouterStart,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a FlexOlmo checkpoint whose experts are the feed-forward networks of dense models.

    Args:
        anchor: The public model, a dense OLMo-2 checkpoint; its network is the expert ``"public"``, and its tokenizer
            the combined model's.
        experts: Dense OLMo-2 checkpoints of the same sizes, by the name each expert shall have.
        output_dir: A folder that does not exist yet or is empty.
        shared: Where everything but the experts and the router comes from.
        start: How the router starts.
        max_shard_size: Largest weight file, and with it the memory that is needed.

    Returns:
        `output_dir` as a path.

    Raises:
        NotOlmo2Error: If a checkpoint is not dense OLMo-2.
        AnchorMismatchError: If one has other settings than the anchor, such as another width.
        DuplicateExpertError, InvalidExpertNameError, EmptyExpertSetError: If a name is taken, unusable, or none is
            given. UnknownExpertError, ConfigurationError, RouterProjectionError: If the rows do not fit.
        ConfigurationError: If one has another tokenizer.
        OutputFolderNotEmptyError, NoSpaceError: If the output has no place.
    """
    refuse_nonempty(output_dir)
    parts = _checked_parts(anchor, experts)
    config = _combined_config(parts, shared, start)
    tensors = {**_shared_tensors(parts, shared), **_routers(config, parts, start), **_networks(parts)}
    with new_folder(output_dir, needed_bytes=bytes_of(tensors)) as folder:
        write_weights(folder, tensors, config.expert_names, max_shard_size, whose="the dense models")
        config.save_pretrained(folder)
        for file in non_weight_files(parts[PUBLIC].folder):
            shutil.copyfile(file, folder / file.name)
    return Path(output_dir)


def _checked_parts(anchor: str | os.PathLike, experts: Mapping[str, str | os.PathLike]) -> dict[str, CheckpointReader]:
    check_distinct([PUBLIC, *(check_expert_name(name) for name in experts)])
    if not experts:
        raise EmptyExpertSetError(["a dense model"])
    parts = {PUBLIC: CheckpointReader(anchor)}
    parts |= {name: CheckpointReader(path) for name, path in experts.items()}
    wanted = anchor_settings(parts[PUBLIC].config)
    for name, reader in parts.items():
        if not reader.is_dense:
            raise NotOlmo2Error(reader.config.model_type)
        found = anchor_settings(reader.config)
        if differing := [
            f"{key} {found[key]!r} instead of {wanted[key]!r}" for key in wanted if found[key] != wanted[key]
        ]:
            raise AnchorMismatchError(name, differing, [])
        if tokenizers_differ(parts[PUBLIC].folder, reader.folder):
            raise ConfigurationError(
                f"The dense model for expert {name!r} has another tokenizer than the anchor.",
                "Train dense models from the anchor, with its tokenizer: they share its embeddings.",
            )
    return parts


def _combined_config(parts: Mapping[str, CheckpointReader], shared: Shared, start: RouterStart) -> FlexOlmoConfig:
    config = copy.deepcopy(parts[PUBLIC].config)
    per_token = len(parts) if start.experts_per_token is None else start.experts_per_token
    if not 1 <= per_token <= len(parts):
        raise ConfigurationError(
            f"experts_per_token is {per_token}, but there are {len(parts)} experts.", f"Choose 1 to {len(parts)}."
        )
    config.num_experts, config.expert_names, config.num_experts_per_tok = len(parts), list(parts), per_token
    config.active_experts = None
    # What owners' data did to a mean stays when their experts are left out.
    config.shared_averaged = shared is mean_of_all
    config.architectures = ["FlexOlmoForCausalLM"]
    config.validate()
    return config


def _shared_tensors(parts: Mapping[str, CheckpointReader], shared: Shared) -> dict[str, torch.Tensor | Deferred]:
    anchor = parts[PUBLIC]
    names = [name for name in anchor.file_of if ".mlp." not in name]
    return {name: Deferred(anchor.tensor(name).to("meta"), partial(shared, name, parts)) for name in names}


def _routers(
    config: FlexOlmoConfig, parts: Mapping[str, CheckpointReader], start: RouterStart
) -> dict[str, torch.Tensor | Deferred]:
    rows = starting_rows(config, list(parts), start.embeddings, seed=start.seed)
    dtype = parts[PUBLIC].tensor("model.embed_tokens.weight").dtype
    return {f"model.layers.{layer}.mlp.gate.weight": rows_EH.to(dtype) for layer, rows_EH in enumerate(rows)}


def _networks(parts: Mapping[str, CheckpointReader]) -> dict[str, torch.Tensor | Deferred]:
    """Return each dense model's network under its expert's index; every reader calls its own ``experts.0``."""
    return {
        name.replace(".mlp.experts.0.", f".mlp.experts.{index}."): reader.tensor(name)
        for index, reader in enumerate(parts.values())
        for name in reader.file_of
        if ".mlp.experts.0." in name
    }
