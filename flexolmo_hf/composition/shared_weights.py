"""Shared weights that post-training has moved, and their average (BAR, arXiv 2604.18473).

A model merged with them is no longer the anchor plus experts: what the owners' data did to the shared weights stays
when an expert is left out. So it is only done when it is asked for, and said wherever the model is described.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexolmo_hf.errors import AnchorMismatchError, SharedWeightsError

#: Groups of shared weights that may be trained, by the parts of their names that tell them.
SHARED = {
    "embeddings": ("embed_tokens.",),
    "lm_head": ("lm_head.",),
    "attention": (".self_attn.",),
    "norms": ("layernorm.", "model.norm."),
}

#: How such a tensor is called in a package: before its name in the model.
PREFIX = "shared."


def is_shared(name: str, groups: Sequence[str]) -> bool:
    """Tell whether a tensor of the model belongs to one of the groups of `SHARED`."""
    return any(part in name for group in groups for part in SHARED.get(group, ()))


def refuse_unless_averaged(packages: Mapping[str, Any], average_shared: bool) -> None:
    """Refuse packages whose shared weights moved, unless their average was asked for.

    Raises:
        SharedWeightsError: Naming the packages and what moved.
    """
    moved = {name: list(package.manifest.unfrozen) for name, package in packages.items() if package.manifest.unfrozen}
    if moved and not average_shared:
        raise SharedWeightsError(moved)


def averaged(name: str, of_anchor: torch.Tensor, packages: Mapping[str, Any]) -> torch.Tensor:
    """Return the mean of a shared tensor over all packages; one that left it frozen contributes the anchor's.

    Args:
        name: The tensor's name in the model.
        of_anchor: Its value in the anchor.
        packages: The packages by expert.

    Raises:
        AnchorMismatchError: If a package has it in another shape.
    """
    found = {expert: package.tensors.get(f"{PREFIX}{name}") for expert, package in packages.items()}
    if all(tensor is None for tensor in found.values()):
        return of_anchor
    total = torch.zeros(of_anchor.shape, dtype=torch.float32)
    for expert, tensor in found.items():
        if tensor is not None and tensor.shape != of_anchor.shape:
            raise AnchorMismatchError(expert, [], [name])
        total += (of_anchor if tensor is None else tensor).float()
    return (total / len(found)).to(of_anchor.dtype)
