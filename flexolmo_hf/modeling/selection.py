"""Who uses which experts in one forward pass: names as callers write them, resolved into what the layers need.

A selection is resolved once and then only read. It holds the experts themselves and their positions as a tensor, so
that a compiled forward takes both as inputs: another set of the same size needs no new compilation.

Shape letters: B batch rows, E experts in memory, A experts of one set.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from flexolmo_hf.errors import ExpertRowsError, ExpertTypeError
from flexolmo_hf.modeling.stamp import Stamp

#: One set of names for the whole batch, or one per row.
RowNames = tuple[tuple[str, ...], ...]


@dataclass(eq=False)
class RowGroup:
    """Rows of a batch that use the same experts.

    Attributes:
        rows: Which rows, ``(n,)`` int64.
        positions: Which experts in memory, ``(A,)`` int64.
    """

    rows: torch.Tensor
    positions: torch.Tensor


@dataclass(eq=False)
class Selection:
    """The experts of one forward pass.

    Attributes:
        names: One set for the whole batch, or one per row; each in checkpoint order.
        experts: The experts that may be computed, by layer; with differing rows, all in memory.
        positions: Where the experts of the one set stand among those in memory, ``(A,)`` int64; None for all of them,
            and where rows differ.
        groups: Where rows differ: the rows by set. Empty for one set.
        rows: Where rows differ: which rows use each expert in memory, ``(n,)``; None if all do, or none does.
        allowed: Where rows differ: whether row b may use expert e, ``(B, E)`` bool.
        pair_rows: Where rows differ: the row of each pair of a row and an expert it may use, expert by expert.
        pair_columns: The expert of each pair.
        counts: Where rows differ: how many rows use each expert in memory.
        version: Which state of which model it was resolved against; see `ExpertSets.experts_version`.
        checked: Whether the cache of this call has been compared with the set before, as `generate` does at its start.
        widest: The size of the largest set.
        narrowest: The size of the smallest set.
        rows_given: How many sets there are.
    """

    names: RowNames
    experts: list[list[nn.Module]]
    positions: torch.Tensor | None = None
    groups: list[RowGroup] = field(default_factory=list)
    rows: list[torch.Tensor | None] = field(default_factory=list)
    allowed: torch.Tensor | None = None
    pair_rows: torch.Tensor | None = None
    pair_columns: torch.Tensor | None = None
    counts: list[int] = field(default_factory=list)
    version: Stamp = field(default_factory=Stamp)
    checked: bool = False
    widest: int = field(init=False)
    narrowest: int = field(init=False)
    rows_given: int = field(init=False)

    @property
    def per_row(self) -> bool:
        """Whether rows use different sets."""
        return self.allowed is not None

    def __post_init__(self) -> None:
        """Measure the sets once: names that are read in a compiled forward would be compiled in."""
        sizes = [len(names) for names in self.names]
        self.widest, self.narrowest, self.rows_given = max(sizes), min(sizes), len(sizes)

    def to(self, device: torch.device) -> "Selection":
        """Return this selection with its tensors on a device; itself if they are there."""
        probe = self.allowed if self.allowed is not None else self.positions
        if probe is None or probe.device == device:
            return self
        return replace(
            self,
            positions=_moved(self.positions, device),
            groups=[RowGroup(group.rows.to(device), group.positions.to(device)) for group in self.groups],
            rows=[_moved(rows, device) for rows in self.rows],
            allowed=_moved(self.allowed, device),
            pair_rows=_moved(self.pair_rows, device),
            pair_columns=_moved(self.pair_columns, device),
        )


def _moved(tensor: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    return None if tensor is None else tensor.to(device)


def select(
    layers: Sequence[nn.ModuleDict], known: Sequence[str], names: RowNames, device: torch.device, version: Stamp
) -> Selection:
    """Resolve sets of names against the experts in memory.

    Args:
        layers: The experts of each layer, all with the same keys.
        known: Names of the experts in memory, in the order of those keys.
        names: One set for the whole batch, or one per row; every name is in `known`.
        device: Where the layers compute.
        version: The state of the model.
    """
    if len(set(names)) == 1:
        (wanted,) = set(names)
        positions = [known.index(name) for name in wanted]
        experts = [list(experts.values()) for experts in layers]
        return Selection(
            names=names,
            experts=[[layer[position] for position in positions] for layer in experts],
            positions=None if len(wanted) == len(known) else torch.tensor(positions, device=device),
            version=version,
        )
    allowed = torch.tensor([[name in row for name in known] for row in names])
    users = [[row for row, wanted in enumerate(names) if name in wanted] for name in known]
    groups = []
    for wanted in dict.fromkeys(names):
        rows = torch.tensor([row for row, other in enumerate(names) if other == wanted], device=device)
        groups.append(RowGroup(rows, torch.tensor([known.index(name) for name in wanted], device=device)))
    return Selection(
        names=names,
        experts=[list(experts.values()) for experts in layers],
        groups=groups,
        rows=[torch.tensor(rows, device=device) if 0 < len(rows) < len(names) else None for rows in users],
        allowed=allowed.to(device),
        pair_rows=torch.tensor([row for rows in users for row in rows], device=device),
        pair_columns=torch.tensor([column for column, rows in enumerate(users) for _ in rows], device=device),
        counts=[len(rows) for rows in users],
        version=version,
    )


def read_rows(value: Any, known: Sequence[str]) -> list[Any] | None:
    """Tell one set for each row from one set for the whole batch, and read a mask as sets.

    Args:
        value: What a caller gave as ``active_experts``: names, a list with one set (or None) per row, or a bool tensor
            ``(E,)`` or ``(B, E)`` over the experts in memory.
        known: Names of the experts in memory.

    Returns:
        One entry per row, each still as the caller wrote it; None if `value` is one set for the whole batch.

    Raises:
        ExpertRowsError: If a mask has another shape or dtype, or there is no row.
        ExpertTypeError: If names and sets are mixed.
    """
    if isinstance(value, torch.Tensor):
        return _rows_of_mask(value, known)
    if isinstance(value, Mapping):
        raise ExpertTypeError(value, known)
    if isinstance(value, str) or not isinstance(value, Collection):
        return None
    entries = list(value)
    if not any(entry is None or (isinstance(entry, Iterable) and not isinstance(entry, str)) for entry in entries):
        return None
    for entry in entries:
        if entry is not None and (isinstance(entry, str | Mapping) or not isinstance(entry, Iterable)):
            raise ExpertTypeError(entry, known)
    return entries


def _rows_of_mask(mask: torch.Tensor, known: Sequence[str]) -> list[list[str]]:
    if mask.dtype != torch.bool or mask.dim() not in (1, 2) or mask.shape[-1] != len(known) or mask.shape[0] == 0:
        raise ExpertRowsError(
            f"a mask of shape {tuple(mask.shape)} and {str(mask.dtype).removeprefix('torch.')}",
            f"a mask is bool and has one column per expert in memory ({len(known)}: {list(known)}), with one row per "
            "row of the batch or none",
        )
    # A caller's mask lives where it lives; reading it once per call is the one place that may wait for the device.
    rows = mask.reshape(-1, len(known)).tolist()
    return [[name for name, used in zip(known, row, strict=True) if used] for row in rows]
