"""How a checkpoint lies on disk: what all experts share in its own files, and each expert in its own.

Removing an expert then is deleting files, and a partial load fetches only what it may use.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers.modeling_utils
from huggingface_hub import StateDictSplit, get_torch_storage_size
from huggingface_hub.serialization import split_state_dict_into_shards_factory
from safetensors.torch import save_file
from transformers.modeling_utils import _add_variant

from flexolmo_hf.errors import NonFiniteTensorError
from flexolmo_hf.modeling.files.locate import INDEX_FILE, SINGLE_FILE
from flexolmo_hf.modeling.files.upstream_hook import UpstreamHook

SHARED = "shared"
FILE_PATTERN = "model{suffix}.safetensors"

_EXPERT_INDEX = re.compile(r"\.mlp\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Deferred:
    """A tensor that is made when its file is written, and not kept.

    Attributes:
        like: A tensor of its shape and dtype on the device "meta".
        make: Makes it.
    """

    like: torch.Tensor
    make: Callable[[], torch.Tensor]


def bytes_of(tensors: Mapping[str, torch.Tensor | Deferred]) -> int:
    """Return how many bytes the tensors take in files."""
    return sum(_like(tensor).nbytes for tensor in tensors.values())


def split_by_expert(
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str],
    max_shard_size: int | str,
    filename_pattern: str = FILE_PATTERN,
) -> StateDictSplit:
    """Plan the files of a checkpoint: ``model-shared-00001-of-00001.safetensors``, ``model-expert-math-...``.

    Args:
        tensors: The state of the model, its experts numbered 0, 1, ...
        names: Names of these experts.
        max_shard_size: Largest file, unless one tensor is larger. No file holds tensors of two experts.
        filename_pattern: As in `huggingface_hub`, with ``{suffix}``.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {SHARED: {}, **{f"expert-{name}": {} for name in names}}
    for key, tensor in tensors.items():
        match = _EXPERT_INDEX.search(key)
        groups[SHARED if match is None else f"expert-{names[int(match[1])]}"][key] = tensor
    files: dict[str, list[str]] = {}
    for group, members in groups.items():
        # Not by storage, as `huggingface_hub` would: packed experts are views of one.
        plan = split_state_dict_into_shards_factory(
            members, get_storage_size=get_torch_storage_size, max_shard_size=max_shard_size, filename_pattern="{suffix}"
        )
        shards = list(plan.filename_to_tensors.values()) if members else []
        for number, keys in enumerate(shards, start=1):
            files[filename_pattern.format(suffix=f"-{group}-{number:05d}-of-{len(shards):05d}")] = keys
    return StateDictSplit(
        metadata={"total_size": sum(get_torch_storage_size(tensor) for tensor in tensors.values())},
        filename_to_tensors=files,
        tensor_to_filename={key: file for file, keys in files.items() for key in keys},
    )


def write_weights(
    folder: Path,
    tensors: Mapping[str, torch.Tensor | Deferred],
    names: Sequence[str],
    max_shard_size: int | str,
    *,
    whose: str,
) -> None:
    """Write the files of a checkpoint and their index, one file in memory at a time.

    Args:
        folder: Where.
        tensors: The state of the model, mapped from files as a rule, or made file by file.
        names: Names of its experts.
        max_shard_size: Largest file.
        whose: Where the tensors come from, for the error.

    Raises:
        NonFiniteTensorError: If one holds NaN or infinity.
    """
    plan = split_by_expert({key: _like(tensor) for key, tensor in tensors.items()}, names, max_shard_size)
    for file, keys in plan.filename_to_tensors.items():
        written = {key: _made(tensors[key]) for key in keys}
        for key, tensor in written.items():
            if not torch.isfinite(tensor).all():
                raise NonFiniteTensorError(key, whose)
        contiguous = {key: tensor.contiguous() for key, tensor in written.items()}
        save_file(contiguous, folder / file, metadata={"format": "pt"})
        # Before the next file's are made.
        del written, contiguous, tensor
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", "utf-8")


def _like(tensor: torch.Tensor | Deferred) -> torch.Tensor:
    return tensor.like if isinstance(tensor, Deferred) else tensor


def _made(tensor: torch.Tensor | Deferred) -> torch.Tensor:
    return tensor.make() if isinstance(tensor, Deferred) else tensor


def remove_single_file(folder: Path, variant: str | None = None) -> None:
    """Remove what an earlier save left as one file: loading would prefer it to the files of this layout."""
    single, index = _add_variant(SINGLE_FILE, variant), _add_variant(INDEX_FILE, variant)
    if (folder / index).is_file():
        (folder / single).unlink(missing_ok=True)


_PLAN = UpstreamHook(transformers.modeling_utils, "split_torch_state_dict_into_shards")


@contextmanager
def files_by_expert(names: Sequence[str]) -> Iterator[None]:
    """Let upstream's `save_pretrained` use this layout inside the block.

    Args:
        names: Names of the experts, in the order of their indices.
    """

    def plan(state_dict: Any, *, filename_pattern: str, max_shard_size: int | str) -> StateDictSplit:
        return split_by_expert(state_dict, names, max_shard_size, filename_pattern)

    with _PLAN.replaced(plan):
        yield
