"""Naming the experts of a checkpoint that has none, by comparing their matrices with experts whose names are known."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Olmo2Config

from flexolmo_hf.composition.manifest import MANIFEST_FILE
from flexolmo_hf.composition.package import ExpertPackage
from flexolmo_hf.composition.reader import CheckpointReader
from flexolmo_hf.errors import AmbiguousExpertError, ConfigurationError, NotFlexOlmoError
from flexolmo_hf.modeling.expert import MATRICES
from flexolmo_hf.modeling.files.locate import CONFIG_FILE, looks_like_a_repository
from flexolmo_hf.modeling.files.sidecar import NAMES_FILE, names_in_settings, write_expert_names
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name, default_expert_names

#: The relative distance up to which an expert may be a copy: rounding to bfloat16 twice leaves about 0.002.
CLOSE = 0.01
#: How much nearer than the next expert a copy must be: experts that were trained briefly are close to each other too.
MARGIN = 10

_SAMPLED_ROWS, _ROWS_AT_A_TIME = 8, 512
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers")

Place = str | os.PathLike
Matrices = Callable[[int, str], torch.Tensor]


@dataclass(frozen=True)
class IdentifiedExpert:
    """One expert of the checkpoint.

    Attributes:
        index: Its index in the checkpoint.
        name: What it is called now.
        match: ``"identical"``, ``"nearest"`` (as close as rounding leaves a copy) or ``"none"``: no reference is it.
        distance: The relative distance to its reference; None without one.
    """

    index: int
    name: str
    match: str
    distance: float | None


@dataclass(frozen=True)
class Identification:
    """What the comparison found.

    Attributes:
        experts: One entry per expert, in checkpoint order.
        unmatched: References that are not in the checkpoint: the relative distance of the expert nearest to each.
        written: Whether the names were written beside the checkpoint.
    """

    experts: list[IdentifiedExpert]
    unmatched: dict[str, float]
    written: bool = False

    @property
    def expert_names(self) -> list[str]:
        """One name per expert, in checkpoint order."""
        return [expert.name for expert in self.experts]

    def table(self) -> str:
        """Write the result as lines of text."""
        width = max(len("name"), *(len(name) for name in [*self.expert_names, *self.unmatched]))
        lines = [f"{'index':<5}  {'name':<{width}}  {'match':<9}  distance"]
        for expert in self.experts:
            distance = "-" if expert.distance is None else f"{expert.distance:.2e}"
            lines.append(f"{expert.index:<5}  {expert.name:<{width}}  {expert.match:<9}  {distance}")
        lines += [f"{'-':<5}  {name:<{width}}  absent     {far:.2e}" for name, far in self.unmatched.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Reference:
    name: str
    matrix: Matrices


def identify_experts(
    checkpoint: Place, references: Mapping[str, Place] | Iterable[Place], *, write: bool = False
) -> Identification:
    """Find out which expert of a checkpoint is which, and optionally write the names beside it.

    A few rows of each layer tell which experts may be the same; those are then compared whole. Of two dtypes, both
    sides are rounded to the coarser one first.

    Args:
        checkpoint: A FlexOlmo checkpoint, such as a released one without names.
        references: What holds each expert under its name, or a list of it, in which an entry may also be written
            ``NAME=FOLDER``. A reference is an expert package or a two-expert checkpoint (whose other expert than the
            public one is meant); both may bring their own name. A dense OLMo-2 checkpoint is the public expert.
        write: Whether to write ``expert_names.json`` beside the checkpoint, which later loads read.

    Returns:
        Each expert's name and how it was found. An expert that fits no reference keeps the name it has.

    Raises:
        AmbiguousExpertError: If a reference fits two experts, or two references fit one.
        ConfigurationError: If a reference has other sizes, several experts or no name; or if names cannot be written,
            because the checkpoint is a Hub repository or its ``config.json`` has other names.
        NotFlexOlmoError: If the checkpoint is a dense model, or a reference of yet another architecture.
        CheckpointNotFoundError, DamagedFileError, IncompleteCheckpointError, UnexpectedTensorError, NotAPackageError,
        NonFiniteTensorError: If the checkpoint or a reference cannot be read or trusted.
        InvalidExpertNameError, DuplicateExpertError: If a name is unusable or given twice.
    """
    if write and looks_like_a_repository(checkpoint):
        raise ConfigurationError(
            f"{str(checkpoint)!r} is a repository on the Hub, beside which nothing can be written.",
            "Download it into a folder and name that one, or only look at the names with write=False (--no-write).",
        )
    reader = CheckpointReader(checkpoint)
    if reader.is_dense:
        raise NotFlexOlmoError(Olmo2Config.model_type)
    _refuse_forms("The checkpoint", reader.config.expert_forms)
    known = [_reference(name, place, reader) for name, place in _pairs(references)]
    if not known:
        raise ConfigurationError("There is no reference.", "Give at least one package or checkpoint to compare with.")
    check_distinct([reference.name for reference in known])
    found, unmatched = _matches(reader, known)
    experts = _named(reader.config.expert_names, found)
    names = [expert.name for expert in experts]
    check_distinct(names)
    write = write and names != reader.config.expert_names
    if write:
        _refuse_other_names(reader, names)
        write_expert_names(reader.folder, names)
    return Identification(experts, unmatched, written=write)


def _pairs(references: Mapping[str, Place] | Iterable[Place]) -> list[tuple[str | None, Place]]:
    if isinstance(references, Mapping):
        return list(references.items())
    if isinstance(references, str | os.PathLike):
        references = [references]
    pairs: list[tuple[str | None, Place]] = []
    for reference in references:
        name, separator, place = str(reference).partition("=")
        pairs.append((name, place) if separator and not Path(reference).exists() else (None, reference))
    return pairs


def _reference(name: str | None, place: Place, reader: CheckpointReader) -> _Reference:
    if name is not None:
        check_expert_name(name)
    shown = name or Path(place).name
    if (Path(place) / MANIFEST_FILE).is_file():
        package = ExpertPackage.from_pretrained(place)
        _refuse_other_sizes(shown, package.manifest.anchor.settings, reader)
        _refuse_forms(f"Reference {shown!r}", package.manifest.form)
        return _Reference(name or package.name, lambda layer, matrix: package.tensors[f"layers.{layer}.{matrix}"])
    other = CheckpointReader(place)
    _refuse_other_sizes(shown, other.config.to_dict(), reader)
    _refuse_forms(f"Reference {shown!r}", other.config.expert_forms)
    index, own = _meant_expert(name, shown, other)
    return _Reference(name or own, _matrices(other, index))


def _refuse_forms(what: str, forms: Mapping[str, object]) -> None:
    if forms:
        raise ConfigurationError(
            f"{what} holds an expert that is low-rank or narrow, and only full matrices can be compared.",
            "Write full ones first: ExpertPackage.materialise for a package, flexolmo export for a checkpoint.",
        )


def _refuse_other_sizes(shown: str, sizes: Mapping[str, object], reader: CheckpointReader) -> None:
    differing = [
        f"{key} {sizes.get(key)} instead of {getattr(reader.config, key)}"
        for key in _SIZES
        if sizes.get(key) != getattr(reader.config, key)
    ]
    if differing:
        raise ConfigurationError(
            f"Reference {shown!r} has other sizes than the checkpoint: {', '.join(differing)}.",
            "Its expert cannot be one of these; leave it out.",
        )


def _meant_expert(name: str | None, shown: str, reference: CheckpointReader) -> tuple[int, str]:
    """Tell which expert of a reference checkpoint is meant, and how that one is called."""
    names = reference.config.expert_names
    if name in names:
        return names.index(name), name
    candidates = [other for other in names if other != PUBLIC] or names
    if len(candidates) > 1:
        raise ConfigurationError(
            f"Reference {shown!r} has the experts {names}, and it is not said which one is meant.",
            "Write NAME=FOLDER with one of these names, or give a checkpoint with one expert beside the public one.",
        )
    (own,) = candidates
    if name is None and own != PUBLIC and own in default_expert_names(len(names)):
        raise ConfigurationError(
            f"Reference {shown!r} does not say how its expert is called.", "Write NAME=FOLDER, such as math=FOLDER."
        )
    return names.index(own), own


def _matrices(reader: CheckpointReader, index: int) -> Matrices:
    return lambda layer, matrix: reader.tensor(f"model.layers.{layer}.mlp.experts.{index}.{matrix}")


def _matches(
    reader: CheckpointReader, known: list[_Reference]
) -> tuple[dict[int, tuple[str, float]], dict[str, float]]:
    """Return name and distance by expert index, and the distances of the references that are not there."""
    found: dict[int, tuple[str, float]] = {}
    unmatched: dict[str, float] = {}
    for reference in known:
        distances = _distances(reader, reference)
        fitting = _fitting(distances)
        if len(fitting) > 1:
            raise AmbiguousExpertError([reference.name], fitting)
        if not fitting:
            unmatched[reference.name] = min(distances)
            continue
        (index,) = fitting
        if index in found:
            raise AmbiguousExpertError([found[index][0], reference.name], fitting)
        found[index] = reference.name, distances[index]
    return found, unmatched


def _fitting(distances: list[float]) -> list[int]:
    """Return the indices of the experts that a reference may be: none, one, or several it cannot tell apart."""
    if identical := [index for index, distance in enumerate(distances) if distance == 0]:
        return identical
    best = min(distances)
    if best > CLOSE:
        return []
    return [index for index, distance in enumerate(distances) if distance < MARGIN * best]


def _distances(reader: CheckpointReader, reference: _Reference) -> list[float]:
    layers = range(reader.config.num_hidden_layers)
    sample, whole = [(layer, MATRICES[0]) for layer in layers], [(layer, name) for layer in layers for name in MATRICES]
    distances = []
    for index in range(reader.config.num_experts):
        expert = _matrices(reader, index)
        distance = _distance(expert, reference.matrix, sample, _SAMPLED_ROWS)
        if distance <= CLOSE:
            distance = _distance(expert, reference.matrix, whole)
        distances.append(distance)
    return distances


def _distance(mine: Matrices, theirs: Matrices, keys: list[tuple[int, str]], rows: int | None = None) -> float:
    """Return the norm of the difference over that of the reference; 0 only if both are equal in every number."""
    difference = norm = 0.0
    equal = True
    for key in keys:
        # Tensors are mapped from their files: of the rows that are cut off here, nothing is read.
        one, other = mine(*key)[:rows], theirs(*key)[:rows]
        coarser = max(one.dtype, other.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        for a, b in zip(one.split(_ROWS_AT_A_TIME), other.split(_ROWS_AT_A_TIME), strict=True):
            a, b = a.to(coarser), b.to(coarser)
            equal = equal and torch.equal(a, b)
            difference += float((a.double() - b.double()).square().sum())
            norm += float(b.double().square().sum())
    if equal:
        return 0.0
    # A checkpoint with NaN in it is far from everything.
    return math.sqrt(difference / norm) if norm and math.isfinite(difference) else math.inf


def _named(current: list[str], found: Mapping[int, tuple[str, float]]) -> list[IdentifiedExpert]:
    taken = {name for name, _ in found.values()}
    experts = []
    for index, own in enumerate(current):
        if index in found:
            name, distance = found[index]
            experts.append(IdentifiedExpert(index, name, "nearest" if distance else "identical", distance))
        else:
            # The name of the first expert of all checkpoints may turn out to be another's.
            experts.append(IdentifiedExpert(index, f"expert_{index}" if own in taken else own, "none", None))
    return experts


def _refuse_other_names(reader: CheckpointReader, names: list[str]) -> None:
    settings = json.loads((reader.folder / CONFIG_FILE).read_text("utf-8"))
    own = names_in_settings(settings, reader.config.num_experts)
    if own is not None:
        raise ConfigurationError(
            f"config.json names the experts {own}, but the comparison found {names}.",
            f"{NAMES_FILE} must not contradict it: correct expert_names in config.json, "
            "or only look at the names with write=False (--no-write).",
        )
