"""Find a checkpoint and look at what it says it is, before anything is loaded from it."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from flexolmo_hf.errors import CheckpointNotFoundError, DamagedFileError, FlexOlmoError

CONFIG_FILE = "config.json"
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")


def looks_like_a_repository(path: str | os.PathLike) -> bool:
    """Tell whether a name that is no folder here could be a repository on the Hub."""
    return not Path(path).exists() and _REPOSITORY.fullmatch(str(path)) is not None


def model_type_of(path: str | os.PathLike, subfolder: str = "") -> str | None:
    """Return the architecture that a local checkpoint names; None for a repository, which is not asked here.

    Raises:
        CheckpointNotFoundError: If there is no such folder and the name cannot be a repository's.
        DamagedFileError: If ``config.json`` is missing or no settings.
    """
    if looks_like_a_repository(path):
        return None
    if not Path(path).is_dir():
        raise CheckpointNotFoundError(Path(path).name, "")
    file = Path(path) / subfolder / CONFIG_FILE
    try:
        settings = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise DamagedFileError(CONFIG_FILE, f"it is missing in {Path(path).name!r}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(CONFIG_FILE, "it is not JSON") from error
    if not isinstance(settings, dict):
        raise DamagedFileError(CONFIG_FILE, "it holds no settings")
    return str(settings.get("model_type"))


@contextmanager
def named_errors(path: Any) -> Iterator[None]:
    """Turn the hosts' errors about files and repositories into ours.

    Raises:
        DamagedFileError: If a weight file cannot be read.
        CheckpointNotFoundError: If a repository cannot be reached or does not exist.
    """
    try:
        yield
    except FlexOlmoError:
        raise
    except SafetensorError as error:
        raise DamagedFileError(_first_damaged_file(path), "it is truncated or not a safetensors file") from error
    except OSError as error:
        if path is None or not looks_like_a_repository(path):
            raise
        raise CheckpointNotFoundError(str(path), str(error).split("\n")[0]) from error


def _first_damaged_file(path: Any) -> str:
    for file in sorted(Path(str(path)).glob("**/*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file.name
    return "a weight file"
