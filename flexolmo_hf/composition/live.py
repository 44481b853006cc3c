"""An expert package put beside the experts of a live model: merging, without writing a checkpoint."""

import os
from collections.abc import Callable
from typing import Any

import torch

from flexolmo_hf.composition.fingerprint import AnchorFingerprint, fingerprint_anchor, is_anchor_tensor
from flexolmo_hf.composition.package import ExpertPackage
from flexolmo_hf.composition.reader import CheckpointReader
from flexolmo_hf.composition.shared_weights import refuse_unless_averaged
from flexolmo_hf.errors import AnchorMismatchError, ConfigurationError, DuplicateExpertError
from flexolmo_hf.modeling.embedded_row import RouterProjection, common_projection
from flexolmo_hf.modeling.files.locate import looks_like_a_repository
from flexolmo_hf.modeling.live import LayerParts, LiveExperts
from flexolmo_hf.modeling.low_rank import tensor_shapes
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name


def add_package(model: LiveExperts, package: Any, name: str | None = None) -> None:
    """Insert a package's expert; see `LiveExperts.add_expert`.

    Args:
        model: The model.
        package: An `ExpertPackage`, the folder of one, or a repository on the Hub.
        name: What to call it; default the package's name.
    """
    opened = package if isinstance(package, ExpertPackage) else ExpertPackage.from_pretrained(package)
    name = check_expert_name(opened.name if name is None else name)
    if name in model.expert_names:
        raise DuplicateExpertError(name, model.expert_names)
    refuse_unless_averaged({name: opened}, average_shared=False)
    check_distinct([*(other for other in model.config.expert_names if other != name), name])
    projections = {"the model": RouterProjection.read(model.config.router_projection)}
    projection = common_projection({**projections, name: opened.manifest.router_projection})
    _refuse_other_anchor(model, name, opened)
    # A package at hand may hold the very memory of the model it was taken from.
    own = opened is package
    rows, biases = opened.rows(), opened.biases()
    form, parts = opened.manifest.form, []
    names = tensor_shapes(model.config.hidden_size, model.config.intermediate_size, form)
    for layer in range(model.config.num_hidden_layers):
        matrices = {key: opened.tensors[f"layers.{layer}.{key}"] for key in names}
        copies = {key: tensor.clone() for key, tensor in matrices.items()} if own else matrices
        parts.append(LayerParts(copies, rows[layer], biases.get(layer)))
    model.insert_expert(name, parts, form)
    model.config.router_projection = None if projection is None else projection.record()
    homes = {key: home for key, home in model._homes.items() if key != name}
    if not own:
        # A folder once and for all: a relative one might later be taken for a repository of that name.
        homes[name] = os.path.abspath(package) if os.path.exists(package) else os.fspath(package)
    model._homes = homes


def _refuse_other_anchor(model: LiveExperts, name: str, package: ExpertPackage) -> None:
    wanted = package.manifest.anchor
    found = _anchor_in_memory(model)
    if found is None or (found.tensors != wanted.tensors and _other_dtype(model, package)):
        # What is in memory was rounded, or lacks the public expert: the files it came from can still tell.
        found = _anchor_on_disk(model) or found
    if found is None:
        raise ConfigurationError(
            f"It cannot be told whether {name!r} was trained beside this public model: {PUBLIC!r} is not in memory.",
            f"Load it first: model.load_expert({PUBLIC!r}).",
        )
    settings, tensors = wanted.differing_settings(found), wanted.differing_tensors(found)
    if settings or tensors:
        raise AnchorMismatchError(name, settings, tensors)


def _anchor_in_memory(model: LiveExperts) -> AnchorFingerprint | None:
    if PUBLIC not in model.expert_names or model.config.expert_names[0] != PUBLIC:
        return None
    at = model.expert_position(PUBLIC)
    state = model.state_dict()  # type: ignore[attr-defined]
    rows = {layer: mixture.gate.rows()[0][at].detach() for layer, mixture in enumerate(model.mixtures)}
    return fingerprint_anchor(model.config, state, state.__getitem__, rows)


def _other_dtype(model: LiveExperts, package: ExpertPackage) -> bool:
    return next(iter(package.tensors.values())).dtype != model.mixtures[0].gate.weight.dtype


def _anchor_on_disk(model: LiveExperts) -> AnchorFingerprint | None:
    if model.source is None or looks_like_a_repository(model.source.path):
        return None
    reader = CheckpointReader(os.path.join(model.source.path, model.source.subfolder))
    state = model.state_dict()  # type: ignore[attr-defined]
    for key in reader.file_of:
        if key in state and is_anchor_tensor(key, reader.config):
            _refuse_other_than_rounded(key, state[key], reader.tensor)
    layers = range(reader.config.num_hidden_layers)
    rows = {layer: reader.tensor(f"model.layers.{layer}.mlp.gate.weight")[0].clone() for layer in layers}
    return fingerprint_anchor(reader.config, reader.file_of, reader.tensor, rows)


def _refuse_other_than_rounded(key: str, in_memory: torch.Tensor, read: Callable[[str], torch.Tensor]) -> None:
    if not torch.equal(in_memory.cpu(), read(key).to(in_memory.dtype)):
        raise AnchorMismatchError("the checkpoint in memory", [], [key])
