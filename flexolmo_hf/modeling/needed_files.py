"""Which files of a checkpoint a model needs that leaves experts out."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import _add_variant, get_state_dict_dtype, load_state_dict

from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.locate import INDEX_FILE, SINGLE_FILE

# Without the characters that would lead out of the folder, or that the Hub's client reads as "any file".
_PLAIN_FILE = re.compile(r"[^/\\*?\[\]]+\.safetensors")


def absent_experts(config: FlexOlmoConfig) -> set[str]:
    """Return patterns that find the keys of experts a model of this configuration does not hold; none if it has all."""
    absent = sorted(set(range(config.num_experts)) - set(config.loaded_indices))
    return {rf"\.mlp\.experts\.({'|'.join(map(str, absent))})\."} if absent else set()


def weight_files(config: FlexOlmoConfig, variant: str | None = None) -> tuple[str | None, str | None]:
    """Return the names that a checkpoint's one weight file and the index of several may have; None for one it has not.

    Upstream prefers the one file. Settings can name either of them in ``transformers_weights``.
    """
    if (named := getattr(config, "transformers_weights", None)) is None:
        return _add_variant(SINGLE_FILE, variant), _add_variant(INDEX_FILE, variant)
    return (None, str(named)) if str(named).endswith(".index.json") else (str(named), None)


def files_needed(weight_map: Mapping[str, str], absent: Iterable[str]) -> set[str]:
    """Return the files that hold at least one tensor whose key none of the patterns `absent` finds.

    Args:
        weight_map: The file of each tensor, as the index tells it.
        absent: As from `absent_experts`.
    """
    patterns = [re.compile(pattern) for pattern in absent]
    return {file for key, file in weight_map.items() if not any(pattern.search(key) for pattern in patterns)}


def read_weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor as an index tells it.

    Raises:
        DamagedFileError: If it is no index, or names something else than plain weight files beside it.
    """
    try:
        content = json.loads(index.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(index.name, "it is not JSON") from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(_is_plain_file(file) for file in listed.values()):
        raise DamagedFileError(index.name, "it does not say which file of this folder holds which tensor")
    return listed


def dtype_of_needed(folder: Path, config: FlexOlmoConfig, variant: str | None = None) -> torch.dtype | None:
    """Return the dtype of a checkpoint of several files whose settings do not say it.

    Upstream would look into the first of all files, which may hold nothing but an expert that was left out.

    Args:
        folder: Where the settings, the index and the needed files lie.
        config: Says which experts are wanted.
        variant: As upstream: the infix of weight files of another dtype.

    Returns:
        The dtype as upstream would read it from a file that is needed; None where upstream may look for itself, since
        the settings say it or there is only one file.
    """
    single, index = weight_files(config, variant)
    if config.dtype is not None or index is None or not (folder / index).is_file():
        return None
    if single is not None and (folder / single).is_file():
        return None
    needed = sorted(files_needed(read_weight_map(folder / index), absent_experts(config)))
    return get_state_dict_dtype(load_state_dict(str(folder / needed[0]), map_location="meta")) if needed else None


def _is_plain_file(file: Any) -> bool:
    return isinstance(file, str) and _PLAIN_FILE.fullmatch(file) is not None
