"""The names of a checkpoint's experts in a file beside it, where its ``config.json`` does not tell them."""

import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.modeling.names import check_distinct, check_expert_name, default_expert_names

NAMES_FILE = "expert_names.json"
FORMAT, VERSION = "flexolmo-expert-names", 1


def read_expert_names(folder: str | os.PathLike, count: int) -> list[str] | None:
    """Read the names that lie beside a checkpoint.

    Args:
        folder: The checkpoint's folder.
        count: How many experts the checkpoint has.

    Returns:
        One name per expert in checkpoint order; None if there is no such file.

    Raises:
        DamagedFileError: If the file is of another format or version, or does not name so many experts.
        InvalidExpertNameError, DuplicateExpertError: If a name is unusable or repeated.
    """
    file = Path(folder) / NAMES_FILE
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(NAMES_FILE, "it is not JSON") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise DamagedFileError(NAMES_FILE, "it does not hold the names of experts")
    if content.get("version") != VERSION:
        raise DamagedFileError(
            NAMES_FILE, f"its format is version {content.get('version')!r}, and this program reads version {VERSION}"
        )
    names = content.get("expert_names")
    if not isinstance(names, list) or len(names) != count:
        found = len(names) if isinstance(names, list) else "no"
        raise DamagedFileError(NAMES_FILE, f"it names {found} experts, but the checkpoint has {count}")
    return _checked(names)


def write_expert_names(folder: str | os.PathLike, names: Sequence[str]) -> Path:
    """Write the names of a checkpoint's experts beside it; a former file is replaced in one step.

    Args:
        folder: The checkpoint's folder.
        names: One name per expert in checkpoint order.

    Returns:
        The file.

    Raises:
        InvalidExpertNameError, DuplicateExpertError: If a name is unusable or repeated.
    """
    content = {"format": FORMAT, "version": VERSION, "expert_names": _checked(names)}
    file = Path(folder) / NAMES_FILE
    partial = file.with_name(f".{NAMES_FILE}.partial-{uuid.uuid4().hex[:8]}")
    try:
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return file


def names_in_settings(settings: Mapping[str, Any], count: int) -> list[str] | None:
    """Return the names that a ``config.json`` tells; None if it tells none or only the ones every checkpoint gets."""
    names = settings.get("expert_names")
    return None if not names or names == default_expert_names(count) else names


def with_sidecar_names(settings: Mapping[str, Any], folder: str | os.PathLike, default_count: int) -> dict[str, Any]:
    """Complete the settings of a ``config.json`` with the names that lie beside it.

    Names in ``config.json`` and names beside it must agree: whichever gave way, a set of experts written with the
    other's names would mean other experts.

    Args:
        settings: What ``config.json`` says.
        folder: Where it lies. Anything but a folder here has no file beside it.
        default_count: How many experts there are if the settings do not say.

    Returns:
        The settings, with ``expert_names`` and a set in force that is written with them.

    Raises:
        ConfigurationError: If ``config.json`` has names of its own and they are others.
        FlexOlmoError: As `read_expert_names`.
    """
    count = settings.get("num_experts", default_count)
    names = read_expert_names(folder, count) if isinstance(count, int) else None
    own = names_in_settings(settings, count)
    if names is None or own == names:
        return dict(settings)
    if own is not None:
        raise ConfigurationError(
            f"config.json names the experts {own}, but {NAMES_FILE} beside it names them {names}.",
            f"Remove {NAMES_FILE} if config.json is right; else correct expert_names in config.json.",
        )
    by_default = dict(zip(default_expert_names(count), names, strict=True))
    active = settings.get("active_experts")
    if isinstance(active, list):
        active = [by_default.get(name, name) for name in active]
    return {**settings, "expert_names": names, **({} if active is None else {"active_experts": active})}


def _checked(names: Sequence[str]) -> list[str]:
    for name in names:
        check_expert_name(name)
    check_distinct(names)
    return list(names)
