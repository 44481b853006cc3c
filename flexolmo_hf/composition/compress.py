"""Changing the form of an expert: to a low-rank difference, to fewer neurons, and back to full matrices.

FlexMoRE (arXiv 2602.08818) writes an expert as the public expert plus a low-rank difference, from a truncated singular
value decomposition of (expert - public). Knowledge needs little rank there, reasoning more: measure what is left.

Shape letters: I input width of a matrix, O its output width, r rank, F feed-forward width, H hidden.
"""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.utils import logging

from flexolmo_hf.composition.fingerprint import fingerprint_anchor
from flexolmo_hf.composition.package import ExpertPackage
from flexolmo_hf.composition.reader import CheckpointReader
from flexolmo_hf.composition.verification import describe, refuse_non_finite
from flexolmo_hf.errors import AnchorMismatchError, ConfigurationError
from flexolmo_hf.modeling.configuration import check_expert_form
from flexolmo_hf.modeling.expert import MATRICES
from flexolmo_hf.modeling.live import LiveExperts
from flexolmo_hf.modeling.low_rank import LowRankExpert, describe_form, factor_names

logger = logging.get_logger(__name__)

#: How much of each matrix's difference to the public one is kept if nothing else is said: 1 is all of it.
ENERGY = 0.99

Place = str | os.PathLike


class _Sizes(NamedTuple):
    layers: int
    hidden: int
    inner: int


def compress(
    package: ExpertPackage, *, anchor: Place, rank: int | None = None, energy: float | None = None
) -> ExpertPackage:
    """Write an expert as a low-rank difference to the public expert.

    Args:
        package: A full expert.
        anchor: The public model it was trained beside: a dense OLMo-2 or a FlexOlmo checkpoint.
        rank: Of every matrix; one beyond the matrices' own is lowered to it, and then nothing is lost but rounding.
        energy: Instead of a rank: the share of the squared difference that every matrix keeps at least, above 0 and up
            to 1; the smallest rank that does is taken. Default `ENERGY`.

    Returns:
        A package of the same expert. Its manifest says under ``training`` what was kept; ``evaluation`` is empty, since
        what was measured was another expert.

    Raises:
        ConfigurationError: If the expert is not full, or rank and energy make no sense.
        AnchorMismatchError: If it was trained beside another public model.
        FlexOlmoError: As `CheckpointReader`, if the anchor cannot be read.
    """
    _refuse_other_than_full(package, "compressed")
    sizes = _sizes(package)
    wanted = ENERGY if energy is None else energy
    if (rank is not None and energy is not None) or (rank is not None and rank < 1) or not 0 < wanted <= 1:
        raise ConfigurationError(
            f"rank is {rank} and energy is {energy}.", "Give either a rank of 1 or more, or an energy above 0 up to 1."
        )
    reader = _matching_anchor(anchor, package)
    keys = [(layer, matrix) for layer in range(sizes.layers) for matrix in MATRICES]
    if rank is None:
        rank = max(_rank_for(wanted, _difference(package, reader, *key)) for key in keys)
    rank = min(rank, sizes.hidden, sizes.inner)
    tensors: dict[str, torch.Tensor] = {}
    kept = []
    for layer, matrix in keys:
        difference = _difference(package, reader, layer, matrix)
        dtype = package.tensors[f"layers.{layer}.{matrix}"].dtype
        factors = [factor.to(dtype).contiguous() for factor in low_rank_factors(difference, rank)]
        names = [f"layers.{layer}.{name}" for name in factor_names(matrix)]
        tensors |= dict(zip(names, factors, strict=True))
        kept.append(_energy_kept(difference, *factors))
    record = {
        "rank": rank,
        "energy kept, lowest matrix": round(min(kept), 6),
        "energy kept, mean": round(sum(kept) / len(kept), 6),
    }
    made = _with_form(package, tensors, {"rank": rank}, "compression", record)
    if _bytes(made) >= _bytes(package):
        logger.warning(f"Rank {rank} makes expert {package.name!r} no smaller than its full matrices are.")
    return made


def narrow(package: ExpertPackage, width: int) -> ExpertPackage:
    """Keep some neurons of an expert: in each layer, those with the largest weights.

    A neuron is ranked by the product of the norms of its gate row, up row and down column. No text is looked at: how
    often a neuron is active on an owner's data is not known from its weights, so a narrow expert is a start for
    training rather than a finished expert.

    Args:
        package: A full expert.
        width: How many neurons to keep in each layer.

    Returns:
        A package of the narrow expert, with the share of the norms that was kept in its manifest.

    Raises:
        ConfigurationError: If the expert is not full, or the width is not below its own.
    """
    _refuse_other_than_full(package, "narrowed")
    sizes = _sizes(package)
    check_expert_form(package.name, {"width": width}, sizes.hidden, sizes.inner)
    tensors: dict[str, torch.Tensor] = {}
    kept = []
    for layer in range(sizes.layers):
        gate_FH, up_FH, down_HF = (package.tensors[f"layers.{layer}.{matrix}"] for matrix in MATRICES)
        norms_F = gate_FH.double().norm(dim=1) * up_FH.double().norm(dim=1) * down_HF.double().norm(dim=0)
        # In their former order, so that the same expert comes out wherever it is computed.
        best = norms_F.topk(width).indices.sort().values
        parts = gate_FH[best], up_FH[best], down_HF[:, best].contiguous()
        tensors |= {f"layers.{layer}.{matrix}": part for matrix, part in zip(MATRICES, parts, strict=True)}
        kept.append(float(norms_F[best].sum() / norms_F.sum()) if norms_F.sum() else 1.0)
    record = {
        "width": width,
        "norms kept, lowest layer": round(min(kept), 6),
        "norms kept, mean": round(sum(kept) / len(kept), 6),
    }
    return _with_form(package, tensors, {"width": width}, "narrowing", record)


def materialise(package: ExpertPackage, anchor: Place | None = None) -> ExpertPackage:
    """Write an expert of any form with full matrices, which compute the same up to rounding.

    Args:
        package: An expert; a full one is returned as it is.
        anchor: The public model, for a low-rank expert. A narrow one needs none: it is filled up with neurons of zeros.

    Raises:
        ConfigurationError: If a low-rank expert is given without its anchor.
        AnchorMismatchError: If it was trained beside another public model.
        FlexOlmoError: As `CheckpointReader`, if the anchor cannot be read.
    """
    form, sizes = package.manifest.form, _sizes(package)
    if not form:
        return package
    if "rank" in form and anchor is None:
        raise ConfigurationError(
            f"Expert {package.name!r} is a low-rank difference to its public expert.",
            "Give the public model: materialise(anchor=...).",
        )
    reader = _matching_anchor(anchor, package) if "rank" in form and anchor is not None else None
    tensors = {}
    for layer in range(sizes.layers):
        for matrix in MATRICES:

            def own(name: str, layer: int = layer) -> torch.Tensor:
                return package.tensors[f"layers.{layer}.{name}"]

            def public(layer: int = layer, matrix: str = matrix) -> torch.Tensor:
                assert reader is not None  # of a low-rank expert, the only one that asks
                return reader.tensor(_public_key(layer, matrix))

            tensors[f"layers.{layer}.{matrix}"] = full_matrix(matrix, form, sizes.inner, own, public)
    return _with_form(package, tensors, {}, None, {})


def full_matrix(
    matrix: str,
    form: Mapping[str, int],
    inner: int,
    own: Callable[[str], torch.Tensor],
    public: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """Return one full matrix of an expert of any form.

    Args:
        matrix: One of `MATRICES`.
        form: The expert's form; empty for a full one.
        inner: The width of a full expert.
        own: Gives one of the expert's tensors in this layer by name.
        public: Gives the public expert's matrix; called for a low-rank expert alone.
    """
    if "rank" in form:
        first_rI, second_Or = (own(name) for name in factor_names(matrix))
        return (public().to(first_rI.device).double() + second_Or.double() @ first_rI.double()).to(first_rI.dtype)
    tensor = own(matrix)
    if "width" not in form:
        return tensor
    # A neuron without weights adds nothing, whatever its input.
    missing = inner - form["width"]
    last, first = (missing, 0) if matrix == MATRICES[2] else (0, missing)
    return nn.functional.pad(tensor, (0, last, 0, first))


def low_rank_factors(matrix_OI: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors A ``(r, I)`` and B ``(O, r)`` whose product is the nearest of its rank to a matrix.

    They are those of the truncated singular value decomposition, found from the eigenvectors of the smaller of both
    Gram matrices, which takes a fraction of the time. Each factor carries the root of the singular values.

    Args:
        matrix_OI: The matrix, float64.
        rank: 1 to the smaller of its sizes.
    """
    tall = matrix_OI.shape[0] >= matrix_OI.shape[1]
    values, vectors = torch.linalg.eigh(_gram(matrix_OI))
    best = vectors[:, -rank:].flip(-1)
    # The fourth root of an eigenvalue is the root of a singular value; a direction without any is left as it is.
    scale_r = values[-rank:].flip(-1).clamp(min=0) ** 0.25
    scale_r = torch.where(scale_r > 0, scale_r, 1.0)
    if tall:
        return (best * scale_r).T, (matrix_OI @ best) / scale_r
    return (best.T @ matrix_OI) / scale_r[:, None], best * scale_r


def to_low_rank(model: LiveExperts, expert: str, rank: int, *, seed: int = 0) -> None:
    """Give a new expert of a live model the low-rank form, in which it is then trained: LoRA on that expert alone.

    A is drawn at random (Kaiming, as in LoRA) and B is zero, so the model computes what it did. An expert that has this
    rank already stays as it is.

    Args:
        model: The model.
        expert: An expert whose matrices equal the public one's, bit for bit.
        rank: Of each difference.
        seed: Of the draw.

    Raises:
        UnknownExpertError, ExpertNotLoadedError: If the expert or the public one is not in memory.
        ConfigurationError: If the rank makes no sense, the expert is the public one, differs from it, has another form,
            or is quantised, offloaded or being trained.
    """
    config, first = model.config, model.config.expert_names[0]
    check_expert_form(expert, {"rank": rank}, config.hidden_size, config.intermediate_size)
    own, publics = model.expert_modules(expert), model.expert_modules(first)
    if config.expert_forms.get(expert) == {"rank": rank}:
        return
    model._refuse_special_weights()
    if expert == first:
        raise ConfigurationError(
            f"Expert {expert!r} is the public one, which low-rank experts are relative to.", "Choose another."
        )
    if expert in config.expert_forms or not all(map(_equal, own, publics)):
        form = describe_form(config.expert_forms.get(expert))
        raise ConfigurationError(
            f"Expert {expert!r} ({form}) is no copy of {first!r}, so rank {rank} would lose what it has learned.",
            "Start from a new expert, FlexOlmoForCausalLM.from_dense(..., expert=NAME); or compress a trained one: "
            "ExpertPackage.compress(rank, anchor=...).",
        )
    generator = torch.Generator().manual_seed(seed)
    made = [_starting_at(public, config, rank, generator).train(public.training) for public in publics]
    index = str(model.expert_indices[model.expert_position(expert)])
    with model._changing_experts():
        config.expert_forms = {**config.expert_forms, expert: {"rank": rank}}
        for mixture, module in zip(model.mixtures, made, strict=True):
            mixture.experts[index] = module
            mixture.repack()


def _starting_at(public: nn.Module, config: Any, rank: int, generator: torch.Generator) -> LowRankExpert:
    expert = LowRankExpert(config, rank, public)
    for name, factor in expert.named_parameters():
        if ".A." in name:
            nn.init.kaiming_uniform_(factor, a=math.sqrt(5), generator=generator)
        else:
            nn.init.zeros_(factor)
    return expert.to(next(public.parameters()))


def _equal(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _refuse_other_than_full(package: ExpertPackage, what: str) -> None:
    if package.manifest.form:
        raise ConfigurationError(
            f"Expert {package.name!r} has the form {describe_form(package.manifest.form)}, and only a full one can be "
            f"{what}.",
            "Write it with full matrices first: package.materialise(anchor=...).",
        )


def _sizes(package: ExpertPackage) -> _Sizes:
    settings = package.manifest.anchor.settings
    return _Sizes(settings["num_hidden_layers"], settings["hidden_size"], settings["intermediate_size"])


def _public_key(layer: int, matrix: str) -> str:
    return f"model.layers.{layer}.mlp.experts.0.{matrix}"


def _matching_anchor(anchor: Place, package: ExpertPackage) -> CheckpointReader:
    reader = CheckpointReader(anchor)
    rows = package.public_rows()
    if not reader.is_dense:
        rows = {layer: reader.tensor(f"model.layers.{layer}.mlp.gate.weight")[0].clone() for layer in rows}
    wanted, found = package.manifest.anchor, fingerprint_anchor(reader.config, reader.file_of, reader.tensor, rows)
    if wanted != found:
        raise AnchorMismatchError(package.name, wanted.differing_settings(found), wanted.differing_tensors(found))
    return reader


def _difference(package: ExpertPackage, reader: CheckpointReader, layer: int, matrix: str) -> torch.Tensor:
    own = package.tensors[f"layers.{layer}.{matrix}"]
    return own.double() - reader.tensor(_public_key(layer, matrix)).to(own.device).double()


def _gram(matrix_OI: torch.Tensor) -> torch.Tensor:
    tall = matrix_OI.shape[0] >= matrix_OI.shape[1]
    return matrix_OI.T @ matrix_OI if tall else matrix_OI @ matrix_OI.T


def _rank_for(energy: float, difference_OI: torch.Tensor) -> int:
    values = torch.linalg.eigvalsh(_gram(difference_OI)).clamp(min=0).flip(0)
    kept = values.cumsum(0) / values.sum()
    # An expert that equals the public one has no energy to keep (0 / 0).
    return 1 + int((kept < energy).sum()) if values.sum() > 0 else 1


def _energy_kept(difference_OI: torch.Tensor, first_rI: torch.Tensor, second_Or: torch.Tensor) -> float:
    """Return the share of the squared difference that the factors keep, as they are stored."""
    whole = float(difference_OI.square().sum())
    lost = float((difference_OI - second_Or.double() @ first_rI.double()).square().sum())
    return 1.0 - lost / whole if whole else 1.0


def _bytes(package: ExpertPackage) -> int:
    return sum(tensor.nbytes for tensor in package.tensors.values())


def _with_form(
    package: ExpertPackage,
    matrices: Mapping[str, torch.Tensor],
    form: dict[str, int],
    step: str | None,
    record: Mapping[str, Any],
) -> ExpertPackage:
    """Put other matrices beside a package's router tensors, and say in the manifest what was done."""
    tensors = {**matrices, **{key: tensor for key, tensor in package.tensors.items() if ".router." in key}}
    refuse_non_finite(tensors, package.name)
    manifest = replace(package.manifest, tensors=describe(tensors), sha256="", form=form)
    made = ExpertPackage(manifest, tensors)
    if step is None:
        return made
    about = {**record, "bytes before": _bytes(package), "bytes after": _bytes(made)}
    training = {**package.manifest.training, step: about}
    return ExpertPackage(replace(manifest, training=training, evaluation={}), tensors)
