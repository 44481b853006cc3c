"""Read a checkpoint folder tensor by tensor, without building a model."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, Olmo2Config, PreTrainedConfig

from flexolmo_hf.errors import DamagedFileError, IncompleteCheckpointError, NotFlexOlmoError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.upcycling import anchor_config

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_BYTES = {
    "F64": 8,
    "I64": 8,
    "F32": 4,
    "I32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
}


class CheckpointReader:
    """A checkpoint on disk: a dense OLMo-2 model or a FlexOlmo model, under one set of names.

    Attributes:
        folder: Where the files lie.
        config: As a FlexOlmo configuration; a dense model counts as one with the public expert alone.
        is_dense: Whether the files hold a dense OLMo-2 model.
        file_of: The file that holds each tensor, by FlexOlmo name.
    """

    def __init__(self, path: str | os.PathLike):
        """Open a folder, or download a Hub repository's weights and settings.

        Raises:
            NotFlexOlmoError: If the checkpoint is neither FlexOlmo nor OLMo-2.
            DamagedFileError: If a weight file cannot be read.
        """
        self.folder = _local_folder(path)
        config = AutoConfig.from_pretrained(self.folder)
        self.is_dense = isinstance(config, Olmo2Config)
        self.config = _as_flexolmo(config)
        self._source: dict[str, str] = {}
        self.file_of: dict[str, str] = {}
        for name, file in _weight_map(self.folder).items():
            ours = name.replace(".mlp.", ".mlp.experts.0.") if self.is_dense else name
            self._source[ours], self.file_of[ours] = name, file

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file.

        Raises:
            IncompleteCheckpointError: If no file holds it.
            DamagedFileError: If its file cannot be read.
        """
        with self._open(name) as file:
            return file.get_tensor(self._source[name])

    def shape_and_size(self, name: str) -> tuple[tuple[int, ...], int]:
        """Return a tensor's shape and its bytes on disk, from the file's header."""
        with self._open(name) as file:
            header = file.get_slice(self._source[name])
            shape = tuple(header.get_shape())
        count = 1
        for length in shape:
            count *= length
        return shape, count * _BYTES.get(header.get_dtype(), 4)

    def _open(self, name: str) -> Any:
        if name not in self.file_of:
            raise IncompleteCheckpointError([name])
        return open_safetensors(self.folder / self.file_of[name])


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file on the CPU.

    Raises:
        DamagedFileError: If it is missing, truncated or of another format.
    """
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise DamagedFileError(path.name, "it is truncated or not a safetensors file") from error
    except FileNotFoundError as error:
        raise DamagedFileError(path.name, "it is missing") from error


def non_weight_files(folder: Path) -> Iterator[Path]:
    """Yield the tokenizer, template and generation settings that belong to a model beside its weights."""
    for pattern in (
        "tokenizer*",
        "special_tokens_map.json",
        "vocab.*",
        "merges.txt",
        "chat_template*",
        "generation_config.json",
    ):
        yield from (path for path in sorted(folder.glob(pattern)) if path.is_file())


def _local_folder(path: str | os.PathLike) -> Path:
    if Path(path).is_dir():
        return Path(path)
    return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))


def _as_flexolmo(config: PreTrainedConfig) -> FlexOlmoConfig:
    if isinstance(config, FlexOlmoConfig):
        return config
    if isinstance(config, Olmo2Config):
        return anchor_config(config, expert_names=["public"])
    raise NotFlexOlmoError(config.model_type)


def _weight_map(folder: Path) -> dict[str, str]:
    if (folder / _INDEX).is_file():
        return dict(json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"])
    if not (folder / _SINGLE).is_file():
        raise DamagedFileError(_SINGLE, "it is missing, and so is an index of several files")
    with open_safetensors(folder / _SINGLE) as file:
        return dict.fromkeys(file.keys(), _SINGLE)
