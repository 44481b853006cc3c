"""Merging: experts are put side by side, with no training (arXiv 2507.07024).

Tensors are mapped from the packages' files into the output's, so the memory needed is that of the router's matrices,
not of the model.
"""

import copy
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.composition.card import write_model_card
from flexolmo_hf.composition.fingerprint import AnchorFingerprint, fingerprint_anchor
from flexolmo_hf.composition.package import ExpertPackage
from flexolmo_hf.composition.reader import CheckpointReader, non_weight_files
from flexolmo_hf.composition.router_base import copy_router_base
from flexolmo_hf.composition.shared_weights import averaged, refuse_unless_averaged
from flexolmo_hf.errors import AnchorMismatchError, ConfigurationError, EmptyExpertSetError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.embedded_row import RouterProjection, common_projection
from flexolmo_hf.modeling.files.layout import write_weights
from flexolmo_hf.modeling.low_rank import tensor_shapes
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name
from flexolmo_hf.routing.row_comparison import compare_vectors

Package = ExpertPackage | str | os.PathLike


@dataclass(frozen=True)
class _Parts:
    """What a merge works on: the anchor, the experts to add under their names, and the public router rows by layer."""

    anchor: CheckpointReader
    packages: dict[str, ExpertPackage]
    public_rows: dict[int, torch.Tensor]
    config: FlexOlmoConfig


def merge_experts(
    anchor: str | os.PathLike,
    experts: Mapping[str, Package],
    output_dir: str | os.PathLike,
    *,
    num_experts_per_tok: int | None = None,
    router_bias: bool | None = None,
    average_shared: bool = False,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Compose one model of a public model and independently trained experts.

    Everything is checked before anything is written: every package must have been trained beside this very anchor.
    Experts whose router rows are nearly parallel are merged with a warning.

    Args:
        anchor: The public model: a dense OLMo-2 checkpoint, or a FlexOlmo checkpoint, whose experts are all kept.
        experts: A package, or the folder of one, by the name it shall have in the merged model.
        output_dir: A folder that does not exist yet or is empty.
        num_experts_per_tok: How many experts each token uses; default all of them, as in the released models.
        router_bias: Whether the merged model uses the packages' biases; default if any package has them. Without, stock
            transformers computes the same.
        average_shared: Whether packages may carry shared weights that were trained too; they are averaged over the
            packages, and leaving an expert out is then no longer exact. The configuration and the card say so.
        max_shard_size: Largest weight file; each expert has files of its own.

    Returns:
        `output_dir` as a path. The folder holds ``model-shared-*.safetensors``, ``model-expert-NAME-*.safetensors``,
        their index, the configuration, the anchor's tokenizer and a model card.

    Raises:
        AnchorMismatchError: If a package belongs to another anchor; names what differs.
        SharedWeightsError: If a package carries shared weights and `average_shared` was not said.
        RouterProjectionError: If the rows of two packages, or of one and the anchor, were made from text differently.
        DuplicateExpertError, InvalidExpertNameError, EmptyExpertSetError: If a name is taken, unusable, or none is
        given. NotAPackageError, DamagedFileError: If a package or the anchor cannot be trusted.
        OutputFolderNotEmptyError, NoSpaceError: If the output has no place.
    """
    refuse_nonempty(output_dir)
    parts = _checked_parts(anchor, experts, num_experts_per_tok, router_bias)
    refuse_unless_averaged(parts.packages, average_shared)
    parts.config.shared_averaged |= any(package.manifest.unfrozen for package in parts.packages.values())
    tensors = {**_shared_tensors(parts), **_expert_tensors(parts)}
    _warn_of_parallel_rows(parts.config, tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with new_folder(output_dir, needed_bytes=size) as partial:
        write_weights(partial, tensors, parts.config.expert_names, max_shard_size, whose="the anchor")
        parts.config.save_pretrained(partial)
        for file in non_weight_files(parts.anchor.folder):
            shutil.copyfile(file, partial / file.name)
        copy_router_base(parts.anchor.folder, partial)
        manifests = {name: package.manifest for name, package in parts.packages.items()}
        write_model_card(partial, parts.config, manifests, anchor_has_bias=parts.anchor.config.router_bias)
    return Path(output_dir)


def _checked_parts(
    anchor: str | os.PathLike, experts: Mapping[str, Package], per_token: int | None, router_bias: bool | None
) -> _Parts:
    reader = CheckpointReader(anchor)
    if reader.config.expert_names[0] != PUBLIC:
        raise ConfigurationError(
            f"The anchor's first expert is called {reader.config.expert_names[0]!r}.",
            f"An anchor's first expert is the public one, called {PUBLIC!r}.",
        )
    names = [*reader.config.expert_names, *(check_expert_name(name) for name in experts)]
    check_distinct(names)
    if not experts:
        raise EmptyExpertSetError(["a package"])
    packages = {
        name: package if isinstance(package, ExpertPackage) else ExpertPackage.from_pretrained(package)
        for name, package in experts.items()
    }
    # Before the anchors: another projection makes another public row, and is the reason to name.
    projection = _projection(reader, packages)
    public_rows = _public_rows(reader, packages)
    found = fingerprint_anchor(reader.config, reader.file_of, reader.tensor, public_rows)
    for name, package in packages.items():
        _refuse_other_anchor(name, package.manifest.anchor, found)
    if per_token is not None and not 1 <= per_token <= len(names):
        raise ConfigurationError(
            f"num_experts_per_tok is {per_token}, but the merged model has {len(names)} experts.",
            f"Choose 1 to {len(names)}, or leave it out to use all of them.",
        )
    has_bias = reader.config.router_bias or any(package.manifest.router_bias for package in packages.values())
    config = copy.deepcopy(reader.config)
    config.num_experts, config.expert_names, config.active_experts = len(names), names, None
    forms = {name: dict(package.manifest.form) for name, package in packages.items() if package.manifest.form}
    config.expert_forms = {**config.expert_forms, **forms}
    config.num_experts_per_tok = per_token or len(names)
    config.router_bias = has_bias if router_bias is None else router_bias
    config.router_projection = None if projection is None else projection.record()
    config.architectures = ["FlexOlmoForCausalLM"]
    config.validate()
    return _Parts(reader, packages, public_rows, config)


def _projection(reader: CheckpointReader, packages: Mapping[str, ExpertPackage]) -> RouterProjection | None:
    own = RouterProjection.read(reader.config.router_projection)
    theirs = {name: package.manifest.router_projection for name, package in packages.items()}
    return common_projection({"the anchor": own, **theirs})


def _public_rows(reader: CheckpointReader, packages: Mapping[str, ExpertPackage]) -> dict[int, torch.Tensor]:
    if reader.is_dense:
        # A dense model has no router: the row is the one the experts were trained against, and must be the same for
        # all.
        return next(iter(packages.values())).public_rows()
    layers = range(reader.config.num_hidden_layers)
    return {layer: reader.tensor(f"model.layers.{layer}.mlp.gate.weight")[0].clone() for layer in layers}


def _refuse_other_anchor(name: str, trained_beside: AnchorFingerprint, found: AnchorFingerprint) -> None:
    settings, tensors = trained_beside.differing_settings(found), trained_beside.differing_tensors(found)
    if settings or tensors:
        raise AnchorMismatchError(name, settings, tensors)


def _shared_tensors(parts: _Parts) -> dict[str, torch.Tensor]:
    reader, config = parts.anchor, parts.config
    names = [name for name in reader.file_of if ".mlp." not in name]
    shared = {name: averaged(name, reader.tensor(name), parts.packages) for name in names}
    for layer in range(config.num_hidden_layers):
        gate = f"model.layers.{layer}.mlp.gate"
        rows = [parts.public_rows[layer].unsqueeze(0)]
        if not reader.is_dense:
            rows = [reader.tensor(f"{gate}.weight")]
        rows += [package.rows()[layer].unsqueeze(0) for package in parts.packages.values()]
        shared[f"{gate}.weight"] = torch.cat(rows)
        if config.router_bias:
            shared[f"{gate}.bias"] = _merged_bias(parts, layer, dtype=rows[0].dtype)
    return shared


def _merged_bias(parts: _Parts, layer: int, dtype: torch.dtype) -> torch.Tensor:
    reader = parts.anchor
    biases = [torch.zeros(reader.config.num_experts, dtype=dtype)]
    if reader.config.router_bias:
        biases = [reader.tensor(f"model.layers.{layer}.mlp.gate.bias")]
    none = torch.zeros(1, dtype=dtype)
    return torch.cat([*biases, *(package.biases().get(layer, none) for package in parts.packages.values())])


def _warn_of_parallel_rows(config: FlexOlmoConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    layers = range(config.num_hidden_layers)
    rows_LEH = torch.stack([tensors[f"model.layers.{layer}.mlp.gate.weight"] for layer in layers])
    compare_vectors({name: rows_LEH[:, index] for index, name in enumerate(config.expert_names)})


def _expert_tensors(parts: _Parts) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    config = parts.config
    for index, name in enumerate(config.expert_names):
        package = parts.packages.get(name)
        own = tensor_shapes(config.hidden_size, config.intermediate_size, config.expert_forms.get(name))
        for layer in range(config.num_hidden_layers):
            for matrix in own:
                key = f"model.layers.{layer}.mlp.experts.{index}.{matrix}"
                tensor = parts.anchor.tensor(key) if package is None else package.tensors[f"layers.{layer}.{matrix}"]
                tensors[key] = tensor
    return tensors
