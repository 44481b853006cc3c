"""A domain embedding as a file: plain ``.npy`` with a ``.json`` beside it, or ``.safetensors`` with both in one."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging

from flexolmo_hf.errors import ConfigurationError, DamagedFileError, OutputPlaceError
from flexolmo_hf.modeling.embedded_row import RouterProjection, check_scale
from flexolmo_hf.modeling.files.hashing import hash_tensor
from flexolmo_hf.routing.domain_embedding import DomainEmbedding

logger = logging.get_logger(__name__)

FORMAT, VERSION = "flexolmo-domain-embedding", 1
_NPY, _SAFETENSORS = ".npy", ".safetensors"
_COUNTS = ("documents", "empty", "non_finite")


def save_embedding(embedding: DomainEmbedding, path: str | os.PathLike) -> None:
    """Write an embedding and how it was made: numbers alone, nothing of the texts.

    Args:
        embedding: What to write.
        path: ``NAME.npy``, which any program reads, with ``NAME.json`` beside it for the projection and the counts; or
            ``NAME.safetensors``, which holds both.

    Raises:
        ConfigurationError: If the path ends otherwise.
        OutputPlaceError: If a file is there already, or its folder is not.
    """
    refuse_place(path)
    path = Path(path)
    record = path.with_suffix(".json")
    vector = embedding.vector.detach().cpu().contiguous()
    # Written apart and then renamed: under the final names nothing is ever half-written.
    with tempfile.TemporaryDirectory(prefix=".embedding-", dir=path.parent) as scratch:
        whole = Path(scratch) / path.name
        text = json.dumps(_record(embedding, vector), indent=2, sort_keys=True)
        if path.suffix == _SAFETENSORS:
            save_file({"vector": vector}, whole, metadata={"format": "pt", "flexolmo": text})
        else:
            np.save(whole, vector.float().numpy(), allow_pickle=False)
            (Path(scratch) / record.name).write_text(text + "\n", encoding="utf-8")
            os.replace(Path(scratch) / record.name, record)
        os.replace(whole, path)


def refuse_place(path: str | os.PathLike) -> None:
    """Refuse a path that `save_embedding` cannot write to, before the work.

    Raises:
        ConfigurationError: If it ends neither in ``.npy`` nor in ``.safetensors``.
        OutputPlaceError: If a file is there already, or its folder is not.
    """
    path = Path(path)
    _check_suffix(path)
    for place in [path, path.with_suffix(".json")] if path.suffix == _NPY else [path]:
        if place.exists() or place.is_symlink():
            raise OutputPlaceError(place.name, "a file of that name is there already")
    if not path.parent.is_dir():
        raise OutputPlaceError(path.name, "the folder for it is not there")


def load_embedding(path: str | os.PathLike) -> DomainEmbedding:
    """Read an embedding.

    An ``.npy`` file without a ``.json`` beside it is read as a plain vector. It says nothing about a projection, so
    none can be checked.

    Args:
        path: ``.npy`` or ``.safetensors``.

    Raises:
        DamagedFileError: If the file is missing or damaged, or the record beside it is another's.
        ConfigurationError: If the path ends otherwise.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise DamagedFileError(path.name, "it is missing")
    vector, text = (_read_safetensors if path.suffix == _SAFETENSORS else _read_npy)(path)
    _check_vector(vector, path.name)
    if text is None:
        logger.info("%s says nothing of how it was made, so its projection cannot be compared.", path.name)
        return DomainEmbedding(vector)
    return _with_record(vector, text, path)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (_NPY, _SAFETENSORS):
        raise ConfigurationError(
            f"An embedding file does not end in {path.suffix!r}.", f"Name it with {_NPY} or {_SAFETENSORS}."
        )


def _record(embedding: DomainEmbedding, vector: torch.Tensor) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "projection": None if embedding.projection is None else embedding.projection.record(),
        "scale": embedding.scale,
        **{count: getattr(embedding, count) for count in _COUNTS},
        "sha256": hash_tensor(vector),
    }


def _read_safetensors(path: Path) -> tuple[torch.Tensor, str | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("vector"), file.metadata()["flexolmo"]
    except (SafetensorError, OSError, KeyError, TypeError) as error:
        raise DamagedFileError(path.name, "it holds no domain embedding") from error


def _read_npy(path: Path) -> tuple[torch.Tensor, str | None]:
    try:
        array = np.load(path, allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise TypeError(array.dtype)
        vector = torch.from_numpy(np.array(array, dtype=np.float32, order="C"))
    except (ValueError, TypeError, OSError, EOFError) as error:
        raise DamagedFileError(path.name, "it is no .npy file of numbers") from error
    record = path.with_suffix(".json")
    try:
        return vector, record.read_text("utf-8") if record.is_file() else None
    except UnicodeDecodeError as error:
        raise DamagedFileError(record.name, "it is not JSON") from error


def _check_vector(vector: torch.Tensor, name: str) -> None:
    if vector.dim() not in (1, 2) or not vector.numel() or not vector.is_floating_point():
        raise DamagedFileError(name, f"its shape {tuple(vector.shape)} is neither (H,) nor (L, H), as router rows have")
    if not torch.isfinite(vector).all():
        raise DamagedFileError(name, "it holds NaN or infinite values")


def _with_record(vector: torch.Tensor, text: str, path: Path) -> DomainEmbedding:
    holder = path.with_suffix(".json").name if path.suffix == _NPY else path.name
    try:
        record = json.loads(text)
        if (record["format"], record["version"]) != (FORMAT, VERSION):
            raise ValueError
        check_scale(record["scale"])
        counts = [int(record[count]) for count in _COUNTS]
        projection = RouterProjection.read(record["projection"])
        expected = record["sha256"]
    # Our own refusals of single values are ValueErrors too: in a file they mean that it was altered.
    except (ValueError, KeyError, TypeError) as error:
        raise DamagedFileError(holder, "it is no record of a domain embedding") from error
    if expected != hash_tensor(vector):
        raise DamagedFileError(holder, f"it belongs to another vector than the one in {path.name!r}")
    return DomainEmbedding(vector, projection, record["scale"], *counts)
