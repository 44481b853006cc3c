"""Find a checkpoint and look at what it says it is, before anything is loaded from it."""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from flexolmo_hf.errors import CheckpointNotFoundError, DamagedFileError, FlexOlmoError

CONFIG_FILE, SINGLE_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
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
def named_errors(path: Any, subfolder: str = "") -> Iterator[None]:
    """Turn the hosts' errors about files and repositories into ours.

    Raises:
        DamagedFileError: If a weight file is missing or cannot be read, or a setting is of another type.
        CheckpointNotFoundError: If a repository cannot be reached or does not exist.
    """
    try:
        yield
    except FlexOlmoError:
        raise
    except SafetensorError as error:
        raise DamagedFileError(_first_damaged_file(path), "it is truncated or not a safetensors file") from error
    except StrictDataclassError as error:
        raise DamagedFileError(CONFIG_FILE, str(error).split("\n")[0].rstrip(":").lower()) from error
    except OSError as error:
        if path is None:
            raise
        if looks_like_a_repository(path):
            raise CheckpointNotFoundError(str(path), str(error).split("\n")[0]) from error
        if (file := _first_missing_file(Path(path) / subfolder)) is None:
            raise
        raise DamagedFileError(file, "it is missing") from error


def _first_missing_file(folder: Path) -> str | None:
    if (folder / SINGLE_FILE).is_file():
        return None
    if not (folder / INDEX_FILE).is_file():
        return SINGLE_FILE
    listed = json.loads((folder / INDEX_FILE).read_text("utf-8"))["weight_map"].values()
    return next((Path(file).name for file in sorted(set(listed)) if not (folder / file).is_file()), None)


def _first_damaged_file(path: Any) -> str:
    for file in sorted(Path(str(path)).glob("**/*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError):
            return file.name
    return "a weight file"
