"""A router row that was made from text, and what two rows must have in common to be comparable.

Shape letters: H hidden, L layers.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from flexolmo_hf.errors import ConfigurationError, RouterProjectionError

# A repository's name, or one word: never a path.
_PUBLIC_NAME = re.compile(r"(\w[\w.-]*(/\w[\w.-]*)?)?")


@dataclass(frozen=True)
class RouterProjection:
    """How embeddings became vectors of hidden size; all rows of a router share it.

    Attributes:
        encoder_width: Width of the encoder's embeddings.
        seed: Of the orthonormal projection to the hidden size; None where the widths were equal and nothing was
            projected.
        encoder: The encoder's public name, ``"self"`` for the anchor's hidden states; empty if its owner did not say.

    Raises:
        ConfigurationError: If a value makes no sense, such as a path for a name.
    """

    encoder_width: int
    seed: int | None = None
    encoder: str = ""

    def __post_init__(self) -> None:
        """Check the values: they are read from files too."""
        if type(self.encoder_width) is not int or self.encoder_width < 1:
            raise ConfigurationError(f"encoder_width is {self.encoder_width!r}.", "It is a whole number, at least 1.")
        if self.seed is not None and (type(self.seed) is not int or not 0 <= self.seed < 2**63):
            raise ConfigurationError(f"The projection's seed is {self.seed!r}.", "It is a whole number from 0 on.")
        if not isinstance(self.encoder, str) or not _PUBLIC_NAME.fullmatch(self.encoder):
            # The value may be a path of its owner, so it is not shown.
            raise ConfigurationError(
                "The encoder's name is not one that can be published.", "Give a name such as 'owner/encoder', or none."
            )

    @classmethod
    def read(cls, record: Mapping[str, Any] | None) -> "RouterProjection | None":
        """Read what `record` wrote; None stays None.

        Raises:
            ConfigurationError: If it is no such record.
        """
        if record is None:
            return None
        try:
            return cls(**record)
        except TypeError as error:
            raise ConfigurationError(
                "The record of the router's projection cannot be read.",
                "It has encoder_width, seed and encoder, and nothing else.",
            ) from error

    def record(self) -> dict[str, Any]:
        """Return the values as JSON holds them."""
        return asdict(self)

    def differences(self, other: "RouterProjection") -> list[tuple[str, Any, Any]]:
        """List what differs, with both values; an encoder that was not named differs from none."""
        mine, theirs = self.record(), other.record()
        return [
            (key, mine[key], theirs[key])
            for key in mine
            if mine[key] != theirs[key] and not (key == "encoder" and "" in (mine[key], theirs[key]))
        ]


@dataclass(frozen=True, eq=False)
class EmbeddedRow:
    """A router row made from text.

    Attributes:
        vector: ``(H,)`` for all layers, or ``(L, H)``.
        projection: How it became one of hidden size; None if that is not known.
        scale: The norm it was brought to; None if it was left as it came.
    """

    vector: torch.Tensor
    projection: RouterProjection | None = None
    scale: float | None = None


def common_projection(projections: Mapping[str, RouterProjection | None]) -> RouterProjection | None:
    """Return the projection that all have in common; None if none of them says.

    Args:
        projections: By the name of whom it belongs to, as errors shall call it; None says nothing and fits all.

    Raises:
        RouterProjectionError: If two of them differ.
    """
    known = {name: projection for name, projection in projections.items() if projection is not None}
    # Whoever names the encoder comes first, so that it is compared with every other name.
    ordered = sorted(known, key=lambda name: not known[name].encoder)
    for name in ordered[1:]:
        if differences := known[ordered[0]].differences(known[name]):
            raise RouterProjectionError(ordered[0], name, differences)
    return known[ordered[0]] if ordered else None


def rescaled(vector: torch.Tensor, scale: float) -> torch.Tensor:
    """Bring a vector ``(H,)``, or each of ``(L, H)``, to a norm.

    Raises:
        ConfigurationError: If the norm is none, or a vector is zero and has no direction.
    """
    check_scale(scale)
    norm = vector.norm(dim=-1, keepdim=True)
    if not (norm > 0).all():
        raise ConfigurationError(
            "A router row is zero, so it has no direction and cannot be scaled.", "Leave it out: a row starts at zero."
        )
    return vector * (scale / norm)


def check_scale(scale: float | None) -> None:
    """Refuse what is no norm of a row.

    Raises:
        ConfigurationError: If it is not a positive number; None passes.
    """
    if scale is not None and not (math.isfinite(scale) and scale > 0):
        raise ConfigurationError(f"The rows' scale is {scale}.", "It is a positive number, or None to leave them.")
