"""What a checkpoint or a package holds, from file headers alone."""

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flexolmo_hf.composition.manifest import MANIFEST_FILE
from flexolmo_hf.composition.package import ExpertPackage
from flexolmo_hf.composition.reader import CheckpointReader
from flexolmo_hf.composition.verification import WEIGHTS_FILE
from flexolmo_hf.modeling.low_rank import describe_form


@dataclass
class ExpertSummary:
    """One expert of a checkpoint.

    Attributes:
        name: The expert's name.
        index: Its index in the checkpoint; None for a package.
        parameters: Numbers in its matrices, router rows and biases.
        bytes: Their size on disk.
        files: Names of the files that hold its matrices.
        bias: Its router bias ``min(b, 0)``, averaged over layers; None without biases.
        active: Whether a plain load makes it active.
        form: ``"full"``, ``"rank 16"`` (a low-rank difference to the public expert) or ``"width 512"``.
    """

    name: str
    index: int | None
    parameters: int = 0
    bytes: int = 0
    files: list[str] = field(default_factory=list)
    bias: float | None = None
    active: bool = True
    form: str = "full"


@dataclass
class CheckpointSummary:
    """A checkpoint or package: what it is, its experts, and what they share.

    Attributes:
        kind: ``"FlexOlmo model"``, ``"dense OLMo-2 model"`` or ``"expert package"``.
        experts: One entry per expert, in checkpoint order.
        shared_parameters: Numbers outside the experts.
        shared_bytes: Their size on disk.
        experts_per_token: How many experts each token uses at most.
        anchor_digest: The fingerprint of the anchor a package belongs to; empty for models.
    """

    kind: str
    experts: list[ExpertSummary]
    shared_parameters: int = 0
    shared_bytes: int = 0
    experts_per_token: int = 0
    anchor_digest: str = ""


def inspect_checkpoint(path: str | os.PathLike) -> CheckpointSummary:
    """Describe a checkpoint folder, a Hub repository or an expert package.

    Raises:
        NotFlexOlmoError: If it is a model of another architecture.
        DamagedFileError, NotAPackageError, NonFiniteTensorError: If its files cannot be trusted.
    """
    if (Path(path) / MANIFEST_FILE).is_file():
        return _inspect_package(Path(path))
    return _inspect_model(CheckpointReader(path))


def _inspect_package(folder: Path) -> CheckpointSummary:
    package = ExpertPackage.from_pretrained(folder)
    biases = [float(bias.clamp(max=0)) for bias in package.biases().values()]
    expert = ExpertSummary(
        name=package.name,
        index=None,
        parameters=package.parameters,
        bytes=(folder / WEIGHTS_FILE).stat().st_size,
        files=[WEIGHTS_FILE],
        bias=sum(biases) / len(biases) if biases else None,
        form=describe_form(package.manifest.form),
    )
    return CheckpointSummary("expert package", [expert], anchor_digest=package.manifest.anchor.digest)


def _inspect_model(reader: CheckpointReader) -> CheckpointSummary:
    config = reader.config
    active = reader.active_experts
    experts = [
        ExpertSummary(name, index, active=name in active, form=describe_form(config.expert_forms.get(name)))
        for index, name in enumerate(config.expert_names)
    ]
    summary = CheckpointSummary(
        "dense OLMo-2 model" if reader.is_dense else "FlexOlmo model",
        experts,
        experts_per_token=min(config.num_experts_per_tok, len(active)),
    )
    for name in reader.file_of:
        shape, size = reader.shape_and_size(name)
        _count(summary, name, shape, size, reader.file_of[name])
    if config.router_bias:
        layers = range(config.num_hidden_layers)
        biases = [reader.tensor(f"model.layers.{layer}.mlp.gate.bias").float().clamp(max=0) for layer in layers]
        for expert, mean in zip(experts, torch.stack(biases).mean(dim=0).tolist(), strict=True):
            expert.bias = mean
    return summary


def _count(summary: CheckpointSummary, name: str, shape: tuple[int, ...], size: int, file: str) -> None:
    numbers = 1
    for length in shape:
        numbers *= length
    if ".mlp.experts." in name:
        expert = summary.experts[int(name.split(".mlp.experts.")[1].split(".")[0])]
        expert.parameters, expert.bytes = expert.parameters + numbers, expert.bytes + size
        if file not in expert.files:
            expert.files.append(file)
    elif ".mlp.gate." in name:
        for expert in summary.experts:
            expert.parameters += numbers // len(summary.experts)
            expert.bytes += size // len(summary.experts)
    else:
        summary.shared_parameters += numbers
        summary.shared_bytes += size
