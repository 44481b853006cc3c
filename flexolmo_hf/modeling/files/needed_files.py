"""Which files of a checkpoint a model needs that leaves experts out."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.modeling_utils
from transformers.modeling_utils import _add_variant

from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert_parallel import held_indices
from flexolmo_hf.modeling.files.locate import INDEX_FILE, SINGLE_FILE
from flexolmo_hf.modeling.files.upstream_hook import UpstreamHook

# Without the characters that would lead out of the folder, or that the Hub's client reads as "any file".
_PLAIN_FILE = re.compile(r"[^/\\*?\[\]]+\.safetensors")


def absent_experts(config: FlexOlmoConfig, distributed_config: Any = None) -> set[str]:
    """Return patterns that find the keys of experts this process does not hold; none if it has all.

    Args:
        config: The model's configuration.
        distributed_config: As `from_pretrained` takes it: it can leave experts to other processes.

    Raises:
        ConfigurationError: If these experts cannot be spread as it says.
    """
    absent = sorted(set(range(config.num_experts)) - set(held_indices(config, distributed_config)))
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


_SHARDS = UpstreamHook(transformers.modeling_utils, "get_checkpoint_shard_files")


@contextmanager
def only_needed_files(absent: Iterable[str]) -> Iterator[None]:
    """Let upstream's `from_pretrained` see no files inside the block but those a model needs: it opens no others.

    Besides the weights it reads, upstream opens the first of all files for its dtype, and quantisers open every one.

    Args:
        absent: As from `absent_experts`.
    """

    def shards(*args: Any, **kwargs: Any) -> tuple[list[str], dict[str, Any]]:
        files, metadata = _SHARDS.original(*args, **kwargs)
        needed = files_needed(metadata["weight_map"], absent)
        return [file for file in files if Path(file).name in needed], metadata

    with _SHARDS.replaced(shards):
        yield


def _is_plain_file(file: Any) -> bool:
    return isinstance(file, str) and _PLAIN_FILE.fullmatch(file) is not None
