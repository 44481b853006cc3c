"""Sets of experts as a command line writes them: ``public+math``, or ``all``."""

from collections.abc import Iterable, Sequence
from typing import Any

from flexolmo_hf.errors import ConfigurationError

#: The set of all experts of a model.
EVERY = "all"


def read_set(given: Any) -> tuple[str, ...] | None:
    """Read a set of experts.

    Args:
        given: Names, or one text in which ``+`` joins them; None or "all" for all experts.

    Returns:
        The names as given, or None for all experts.

    Raises:
        ConfigurationError: If a name is empty.
    """
    if given is None or given == EVERY:
        return None
    names = tuple(name.strip() for name in given.split("+")) if isinstance(given, str) else tuple(given)
    if not names or not all(names):
        raise ConfigurationError(
            f"The set of experts {given!r} names no expert or an empty one.", "Write public+math, or all."
        )
    return names


def write_set(names: Sequence[str] | None) -> str:
    """Write a set of experts as `read_set` reads it."""
    return EVERY if names is None else "+".join(names)


def union(sets: Iterable[Sequence[str] | None]) -> tuple[str, ...] | None:
    """Collect the experts that several sets need; None if one of them is all experts."""
    listed = list(sets)
    return None if None in listed else tuple(dict.fromkeys(name for one in listed for name in one or ()))
