"""Read a checkpoint folder tensor by tensor, without building a model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import Olmo2Config

from flexolmo_hf.errors import DamagedFileError, IncompleteCheckpointError, NotFlexOlmoError, UnexpectedTensorError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.files.locate import (
    INDEX_FILE,
    SINGLE_FILE,
    looks_like_a_repository,
    model_type_of,
    named_errors,
)
from flexolmo_hf.modeling.files.needed_files import read_weight_map
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.modeling.upcycling import anchor_config

# Text formats only: a pickle that lies beside a model is not carried on.
_BESIDE_WEIGHTS = ("tokenizer*", "special_tokens_map*", "vocab*", "merges*", "chat_template*", "generation_config*")
_TEXT_FORMATS = {".json", ".txt", ".jinja", ".model"}
_BITS = {"F64": 64, "I64": 64, "F32": 32, "I32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}


class CheckpointReader:
    """A checkpoint on disk, whole: a dense OLMo-2 model or a FlexOlmo model, under one set of names.

    Attributes:
        folder: Where the files lie.
        config: As a FlexOlmo configuration; a dense model counts as one with the public expert alone.
        is_dense: Whether the files hold a dense OLMo-2 model.
        active_experts: What a plain load makes active.
        file_of: The file that holds each tensor, by FlexOlmo name.
    """

    def __init__(self, path: str | os.PathLike):
        """Open a folder, or download a Hub repository's weights and settings, and compare names and shapes.

        Raises:
            CheckpointNotFoundError: If there is no such folder or repository.
            NotFlexOlmoError: If the checkpoint is neither FlexOlmo nor OLMo-2.
            DamagedFileError: If a file cannot be read.
            IncompleteCheckpointError, UnexpectedTensorError: If the files do not hold what the settings describe.
        """
        self.folder = _local_folder(path)
        self.config, self.is_dense = _settings_of(self.folder)
        # What a plain load makes active does not narrow what the files hold.
        self.active_experts = self.config.active_experts or self.config.expert_names
        self.config.active_experts = None
        self._source: dict[str, str] = {}
        self._header: dict[str, tuple[tuple[int, ...], int]] = {}
        self.file_of: dict[str, str] = {}
        for file, (name, header) in _headers(self.folder):
            ours = name.replace(".mlp.", ".mlp.experts.0.") if self.is_dense else name
            self._source[ours], self._header[ours], self.file_of[ours] = name, header, file
        self._refuse_gaps()

    def tensor(self, name: str) -> torch.Tensor:
        """Return one tensor, mapped from its file.

        Raises:
            IncompleteCheckpointError: If no file holds it.
            DamagedFileError: If its file cannot be read.
        """
        if name not in self.file_of:
            raise IncompleteCheckpointError([name])
        with open_safetensors(self.folder / self.file_of[name]) as file:
            return file.get_tensor(self._source[name])

    def shape_and_size(self, name: str) -> tuple[tuple[int, ...], int]:
        """Return a tensor's shape and its bytes on disk, from the file's header."""
        return self._header[name]

    def _refuse_gaps(self) -> None:
        with torch.device("meta"):
            state = FlexOlmoForCausalLM(self.config).state_dict()
        if self.config.tie_word_embeddings:
            state.pop("lm_head.weight")
        expected = {
            name: tuple(tensor.shape) for name, tensor in state.items() if not (self.is_dense and ".mlp.gate." in name)
        }
        unexpected = sorted(self.file_of.keys() - expected.keys())
        if unknown_experts := [name for name in unexpected if ".mlp." in name]:
            raise UnexpectedTensorError(unknown_experts)
        missing = sorted(expected.keys() - self.file_of.keys())
        mismatched = sorted(
            name for name, shape in expected.items() if name in self._header and self._header[name][0] != shape
        )
        if missing or mismatched:
            raise IncompleteCheckpointError(missing, mismatched)
        # What upstream passes over too, such as the copy of tied embeddings or buffers of old checkpoints.
        for name in unexpected:
            del self.file_of[name], self._source[name], self._header[name]


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file on the CPU.

    Raises:
        DamagedFileError: If it is missing, truncated or of another format.
    """
    if not path.exists():
        raise DamagedFileError(path.name, "it is missing")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(path.name, "it is truncated or not a safetensors file") from error


def non_weight_files(folder: Path) -> Iterator[Path]:
    """Yield the tokenizer, template and generation settings that belong to a model beside its weights."""
    for pattern in _BESIDE_WEIGHTS:
        yield from (path for path in sorted(folder.glob(pattern)) if path.suffix in _TEXT_FORMATS and path.is_file())


def _local_folder(path: str | os.PathLike) -> Path:
    if not looks_like_a_repository(path):
        model_type_of(path)
        return Path(path)
    with named_errors(path):
        return Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json", "*.txt", "*.jinja"]))


def _settings_of(folder: Path) -> tuple[FlexOlmoConfig, bool]:
    model_type = model_type_of(folder)
    if model_type not in (FlexOlmoConfig.model_type, Olmo2Config.model_type):
        raise NotFlexOlmoError(model_type)
    with named_errors(folder):
        if model_type == FlexOlmoConfig.model_type:
            return FlexOlmoConfig.from_pretrained(folder), False
        return anchor_config(Olmo2Config.from_pretrained(folder), expert_names=[PUBLIC]), True


def _headers(folder: Path) -> Iterator[tuple[str, tuple[str, tuple[tuple[int, ...], int]]]]:
    """Yield the file, name, shape and size of each tensor the checkpoint lists."""
    listed = _weight_map(folder)
    for file_name in sorted(set(listed.values())) if listed else [SINGLE_FILE]:
        with open_safetensors(folder / file_name) as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                if not listed or listed.get(name) == file_name:
                    entry = file.get_slice(name)
                    shape = tuple(entry.get_shape())
                    yield file_name, (name, (shape, torch.Size(shape).numel() * _BITS.get(entry.get_dtype(), 32) // 8))


def _weight_map(folder: Path) -> dict[str, str]:
    """Return the file of each tensor as the index tells it; empty for a checkpoint of one file."""
    if not (folder / INDEX_FILE).is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise DamagedFileError(SINGLE_FILE, "it is missing, and so is an index of several files")
        return {}
    return read_weight_map(folder / INDEX_FILE)
