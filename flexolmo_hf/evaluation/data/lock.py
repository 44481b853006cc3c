"""The lock file: what a build of FlexMix-mini must come to, so that figures can be compared."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from flexolmo_hf.errors import LockMismatchError

_LOCK = "mini.lock.json"


def read_lock() -> dict[str, Any]:
    """Read the lock file: the record of a build with the usual settings."""
    return json.loads(files(__package__).joinpath(_LOCK).read_text("utf8"))


def compare_with_lock(record: Mapping[str, Any], locked: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Compare a build with the lock file.

    Args:
        record: The record of the build.
        locked: The record to compare with; None for that of the lock file.

    Returns:
        The domains that were compared: none if the settings are others, and those that depend on the interpreter only
        if its library is the same.

    Raises:
        LockMismatchError: If one of them differs.
    """
    locked = read_lock() if locked is None else locked
    if any(record[part] != locked[part] for part in ("settings", "packages")):
        return ()
    comparable = {
        domain: (row, locked["domains"][domain])
        for domain, row in record["domains"].items()
        if all(row.get(key) == locked["domains"][domain].get(key) for key in ("python", "library"))
    }
    differences = [f"{domain}/{part}" for domain, rows in comparable.items() for part in _differences(*rows)]
    if differences:
        raise LockMismatchError(differences)
    return tuple(comparable)


def _differences(built: Mapping[str, Any], locked: Mapping[str, Any]) -> list[str]:
    counts = [key for key in locked if key != "splits" and built.get(key) != locked[key]]
    return counts + [split for split, row in locked["splits"].items() if built["splits"].get(split) != row]
