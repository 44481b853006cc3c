"""Router rows that a mixture starts with where nobody trained any: embeddings of text, or small random vectors.

Shape letters: E experts, H hidden, L layers.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from flexolmo_hf.errors import UnknownExpertError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.embedded_row import EmbeddedRow, common_projection
from flexolmo_hf.modeling.upcycling import check_finite, router_row


def random_row(name: str, hidden_size: int, *, std: float = 0.02, seed: int = 0) -> torch.Tensor:
    """Draw the router row ``(H,)`` of an expert.

    It depends on the expert's name and the seed alone, so that owners who never meet draw the same public row.

    Args:
        name: Whose row.
        hidden_size: Its width.
        std: Standard deviation of its entries.
        seed: Another seed gives other rows.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(hidden_size, generator=generator) * std


def starting_rows(
    config: FlexOlmoConfig,
    names: Sequence[str],
    embeddings: Mapping[str, Any] | None,
    *,
    seed: int = 0,
) -> list[torch.Tensor]:
    """Return the router's matrix ``(E, H)`` of each layer, float32, and note in `config` where its rows come from.

    Args:
        config: The mixture's configuration.
        names: Its experts, in order.
        embeddings: Rows by expert, each ``(H,)`` or ``(L, H)``, or what `domain_embedding` returns; an expert without
            one gets the neutral row, which is zero. None draws random rows for all, with the deviation that the
            configuration has for new weights.
        seed: Of random rows.

    Raises:
        UnknownExpertError: If an embedding belongs to no expert.
        ConfigurationError: If one has another width or is not finite.
        RouterProjectionError: If two come from different projections.
    """
    if embeddings is None:
        std = config.initializer_range
        embeddings = {name: random_row(name, config.hidden_size, std=std, seed=seed) for name in names}
    for name in embeddings:
        if name not in names:
            raise UnknownExpertError(name, list(names))
    embedded = {name: row for name, row in embeddings.items() if isinstance(row, EmbeddedRow)}
    projection = common_projection({name: row.projection for name, row in embedded.items()})
    config.router_projection = None if projection is None else projection.record()
    rows = {name: torch.as_tensor(getattr(row, "vector", row)) for name, row in embeddings.items()}
    for name, row in rows.items():
        check_finite(row, name)
    layers = range(config.num_hidden_layers)
    return [torch.stack([router_row(rows.get(name), layer, config) for name in names]) for layer in layers]
