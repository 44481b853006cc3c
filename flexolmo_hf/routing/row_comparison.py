"""How alike a model's router rows are: experts whose rows are parallel get the same share of every token.

Shape letters: H hidden, L layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import torch
from transformers.utils import logging

from flexolmo_hf.modeling.expert_sets import ExpertSets

logger = logging.get_logger(__name__)

#: Mean cosine from which on two rows count as nearly parallel. Those of the reference repository have 0.52 to 0.92.
PARALLEL = 0.95


@dataclass(frozen=True)
class RowPair:
    """The cosine between two experts' rows.

    Attributes:
        first: Name of one expert.
        second: Name of the other.
        mean: Mean cosine over layers; NaN if a row is zero in some layer, for then it has no direction.
        lowest: The smallest of all layers.
        highest: The largest of all layers.
    """

    first: str
    second: str
    mean: float
    lowest: float
    highest: float


@dataclass(frozen=True)
class RowComparison:
    """The cosines between all rows.

    Attributes:
        pairs: One entry for each two experts, in checkpoint order.
        norms: Mean norm over layers of each expert's row: a longer row takes more of the tokens it points to.
    """

    pairs: list[RowPair]
    norms: dict[str, float]

    @property
    def parallel(self) -> list[RowPair]:
        """The pairs whose mean cosine is above `PARALLEL`."""
        return [pair for pair in self.pairs if pair.mean > PARALLEL]

    def table(self) -> str:
        """Write the result as lines of text."""
        width = max(len("expert"), *(len(name) for name in self.norms))
        head = f"{'expert':<{width}}  {'expert':<{width}}  {'mean':>6}  {'min':>6}  {'max':>6}"
        lines = [f"{'expert':<{width}}  norm", *(f"{name:<{width}}  {norm:.3f}" for name, norm in self.norms.items())]
        lines += ["", head] if self.pairs else []
        for pair in self.pairs:
            names = f"{pair.first:<{width}}  {pair.second:<{width}}"
            lines.append(f"{names}  {pair.mean:>6.3f}  {pair.lowest:>6.3f}  {pair.highest:>6.3f}")
        return "\n".join(lines)


def compare_rows(model: ExpertSets) -> RowComparison:
    """Compare the router rows of all experts in memory, and warn of those that are nearly parallel.

    Args:
        model: A FlexOlmo model.
    """
    rows_per_layer = [mixture.gate.rows()[0].detach() for mixture in model.mixtures]
    return compare_vectors(
        {name: torch.stack([rows[at] for rows in rows_per_layer]) for at, name in enumerate(model.expert_names)}
    )


def compare_vectors(rows_LH: Mapping[str, torch.Tensor]) -> RowComparison:
    """Compare router rows that are in no model yet, and warn of those that are nearly parallel.

    Args:
        rows_LH: Rows ``(L, H)`` by the expert's name.
    """
    rows = {name: row.float() for name, row in rows_LH.items()}
    pairs = []
    for first, second in combinations(rows, 2):
        dots_L = (rows[first] * rows[second]).sum(dim=-1)
        cosines_L = dots_L / (rows[first].norm(dim=-1) * rows[second].norm(dim=-1))
        pairs.append(RowPair(first, second, *(float(value) for value in _spread(cosines_L))))
    comparison = RowComparison(pairs, {name: float(row.norm(dim=-1).mean()) for name, row in rows.items()})
    for pair in comparison.parallel:
        logger.warning(
            "The router rows of %r and %r are nearly parallel (mean cosine %.3f, above %.2f): the router can hardly "
            "tell the two experts apart. Embed texts that are typical of each, and let the rows learn.",
            pair.first,
            pair.second,
            pair.mean,
            PARALLEL,
        )
    return comparison


def _spread(cosines_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return cosines_L.mean(), cosines_L.amin(), cosines_L.amax()
