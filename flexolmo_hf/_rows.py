"""Rows of data from files and folders, for every room that reads an owner's or the public's texts."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from datasets import logging as datasets_logging

from flexolmo_hf.errors import ConfigurationError, DamagedFileError

_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def read_rows(places: Sequence[str], cache: str) -> Dataset:
    """Read rows from files, or from all readable files of folders.

    Raises:
        ConfigurationError: If a place does not exist, holds nothing readable, or kinds are mixed.
        DamagedFileError: If the rows cannot be parsed.
    """
    kind, files = _kind_and_files(places)
    with _plain_refusal(kind, files):
        return load_dataset(kind, split="train", cache_dir=cache, **_options(kind, files))


def stream_texts(places: Sequence[str], cache: str, *, field: str = "text") -> Iterator[str]:
    """Read one text after the other from files, or from all readable files of folders.

    Nothing is copied: of the data, only what is being read is in memory, and none of it goes into the cache.

    Args:
        places: Files, or folders of files.
        cache: A folder for the reader's lock files.
        field: The key of a row that holds its text.

    Yields:
        The texts in the order of the files. A ``.txt`` file is one text.

    Raises:
        ConfigurationError: If a place does not exist, holds nothing readable, kinds are mixed, or a row has no text.
        DamagedFileError: If the rows cannot be parsed.
    """
    kind, files = _kind_and_files(places)
    with _plain_refusal(kind, files):
        rows: IterableDataset = load_dataset(
            kind, split="train", cache_dir=cache, streaming=True, **_options(kind, files)
        )
        for row in rows:
            if not isinstance(row.get(field), str):
                raise ConfigurationError(f"A row of the data holds no text named {field!r}.", "Each row needs one.")
            yield row[field]


def _kind_and_files(places: Sequence[str]) -> tuple[str, list[Path]]:
    files = [file for place in places for file in _files_of(Path(place))]
    kinds = {_READERS[file.suffix] for file in files}
    if len(kinds) != 1:
        raise ConfigurationError(
            f"The data are {len(files)} readable files of {len(kinds)} kinds.",
            f"Give files of one kind: {', '.join(_READERS)}.",
        )
    return kinds.pop(), files


def _files_of(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(file for file in place.rglob("*") if file.suffix in _READERS)
    if not place.is_file():
        raise ConfigurationError(f"There is no data at {place.name!r}.", "Give files or folders that exist.")
    if place.suffix not in _READERS:
        raise ConfigurationError(f"{place.name!r} is of no known kind.", f"Give {', '.join(_READERS)}.")
    return [place]


def _options(kind: str, files: list[Path]) -> dict[str, Any]:
    return {"data_files": [str(file) for file in files], **({"sample_by": "document"} if kind == "text" else {})}


@contextmanager
def _plain_refusal(kind: str, files: list[Path]) -> Iterator[None]:
    level = datasets_logging.get_verbosity()
    # The reader would log the whole path of a file it cannot parse.
    datasets_logging.set_verbosity(datasets_logging.CRITICAL)
    try:
        yield
    except ConfigurationError:
        raise
    except Exception:
        # The reader's own message quotes the text it stumbled over, and a traceback would show it as the cause.
        raise DamagedFileError(", ".join(file.name for file in files[:3]), f"its rows are not {kind}") from None
    finally:
        datasets_logging.set_verbosity(level)
