"""What an expert may be called, and how a set of experts is written down."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexolmo_hf.errors import (
    DuplicateExpertError,
    EmptyExpertSetError,
    ExpertTypeError,
    InvalidExpertNameError,
    UnknownExpertError,
)

#: The name of expert 0 wherever a checkpoint does not say otherwise: the frozen public model's own feed-forward
#: network.
PUBLIC = "public"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")


def default_expert_names(count: int) -> list[str]:
    """Name the experts of a checkpoint that does not: ``public``, ``expert_1``, ..."""
    return [PUBLIC, *(f"expert_{index}" for index in range(1, count))]


def check_expert_name(name: Any) -> str:
    """Return `name` if it can name an expert.

    Raises:
        InvalidExpertNameError: If it is no plain identifier of at most 64 characters.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidExpertNameError(name)
    return name


def check_distinct(names: Sequence[str]) -> None:
    """Refuse a name that appears twice; case is ignored, since file systems may ignore it.

    Raises:
        DuplicateExpertError: If two names are equal.
    """
    seen: set[str] = set()
    for name in names:
        if name.casefold() in seen:
            raise DuplicateExpertError(name, names)
        seen.add(name.casefold())


def parse_expert_set(value: str | Iterable[str] | None, known: Sequence[str]) -> list[str]:
    """Read a set of experts as users write it.

    Args:
        value: None (all), names, or one string of names joined by ``+`` (``"public+math"``), as command lines give it.
        known: All names of the checkpoint, in the order of their indices.

    Returns:
        The names, in checkpoint order: the order of a set never changes a result.

    Raises:
        ExpertTypeError: If anything but names is given, for example an index.
        UnknownExpertError: If a name is not in `known`.
        DuplicateExpertError: If a name appears twice.
        EmptyExpertSetError: If no name is given.
    """
    if value is None:
        return list(known)
    if isinstance(value, str):
        value = value.split("+")
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise ExpertTypeError(value, known)
    names = list(value)
    for name in names:
        if not isinstance(name, str):
            raise ExpertTypeError(name, known)
        if name not in known:
            raise UnknownExpertError(name, known)
    check_distinct(names)
    if not names:
        raise EmptyExpertSetError(known)
    return [name for name in known if name in names]
