"""A source's rows, one after the other, in an order that a resumed build repeats exactly."""

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexolmo_hf.errors import ConfigurationError, DamagedFileError
from flexolmo_hf.evaluation.data.recipe.schema import Source

if TYPE_CHECKING:
    from datasets import IterableDataset

#: Endings of files that can stand in for a source, and what reads them.
READERS = {
    ".jsonl": "json",
    ".json": "json",
    ".jsonl.gz": "json",
    ".json.gz": "json",
    ".jsonl.zst": "json",
    ".json.zst": "json",
    ".parquet": "parquet",
}

Place = str | os.PathLike | Sequence[str | os.PathLike]


def open_rows(source: Source, files: Sequence[Path] | None, cache: Path) -> "IterableDataset":
    """Open a source for streaming: nothing is kept on the disk.

    Args:
        source: What to open.
        files: Files to read in its place; None for the Hub.
        cache: A folder for the reader's lock files.

    Raises:
        DamagedFileError: If files cannot be read.
        ConfigurationError: If the Hub has no such data set, or cannot be reached.
    """
    from datasets import load_dataset

    where: dict[str, Any]
    if files is not None:
        kind = READERS[_ending(files[0])]
        where = {"path": kind, "data_files": [str(file) for file in files], "split": "train", "cache_dir": str(cache)}
    elif source.reader is not None:
        place = f"hf://datasets/{source.repository}@{source.revision}"
        where = {
            "path": source.reader,
            "data_files": [f"{place}/{pattern}" for pattern in source.data_files],
            "split": "train",
        }
    else:
        where = {
            "path": source.repository,
            "name": source.config,
            "data_dir": source.data_dir,
            "data_files": list(source.data_files) or None,
            "split": source.split,
            "revision": source.revision,
        }
    try:
        rows: IterableDataset = load_dataset(**where, streaming=True)
    except Exception as error:
        raise _unreadable(source, files) from _shown(error, files)
    return rows


def files_of(place: Place, source: str) -> list[Path]:
    """List the readable files of a place: a file, a folder of files, or several of either.

    Raises:
        ConfigurationError: If there is none, or they are of several kinds.
    """
    places = [place] if isinstance(place, (str, os.PathLike)) else list(place)
    files = [file for each in places for file in _below(Path(each))]
    if len({READERS[_ending(file)] for file in files}) != 1:
        raise ConfigurationError(
            f"For the source {source!r} there are {len(files)} readable files{', of several kinds' if files else ''}.",
            f"Give files of one kind: {', '.join(READERS)}.",
        )
    return files


def _below(place: Path) -> list[Path]:
    found = sorted(place.rglob("*")) if place.is_dir() else [place]
    return [file for file in found if file.is_file() and _ending(file) in READERS]


def _ending(file: Path) -> str:
    return next((ending for ending in READERS if file.name.endswith(ending)), file.suffix)


def _shown(error: Exception, files: Sequence[Path] | None) -> Exception | None:
    # The reader's own message quotes the row it stumbled over, which of a user's own files is nobody's business.
    return error if files is None else None


def _unreadable(source: Source, files: Sequence[Path] | None) -> Exception:
    if files is not None:
        return DamagedFileError(", ".join(file.name for file in files[:3]), "its rows cannot be read")
    return ConfigurationError(
        f"The source {source.name!r} ({source.repository}) cannot be streamed from the Hub.",
        "Check the connection, the revision, and whether its terms have to be accepted with your account; or give "
        "local files of the same schema.",
    )


class ShuffledRows:
    """Iterates over rows, shuffled block by block, and says where it stands.

    datasets' own shuffle buffer is lost when a stream is resumed, so that a resumed build would hold other documents.
    Here a block of rows is read, brought into an order that only the seed and the block's number decide, and handed
    out; to resume, the block is read again.

    Args:
        source: The source the rows are of.
        files: Files to read in its place.
        cache: A folder for the reader's lock files.
        seed: Decides the order.
        block: Rows that are shuffled together.
        position: Where an earlier iteration stood; None to start.
    """

    def __init__(
        self,
        source: Source,
        files: Sequence[Path] | None,
        cache: Path,
        *,
        seed: int,
        block: int,
        position: Mapping[str, Any] | None = None,
    ):
        self._source, self._files = source, files
        self._rows = open_rows(source, files, cache)
        self._seed, self._size = f"{seed} {source.name}", block
        self._start: Any = None
        self._block = self._taken = 0
        if position is not None:
            self._start, self._block, self._taken = position["start"], position["block"], position["taken"]
        if self._start is not None:
            self._rows.load_state_dict(self._start)

    def position(self) -> dict[str, Any]:
        """Return where the iteration stands, after the row that it yielded last."""
        return {"start": self._start, "block": self._block, "taken": self._taken}

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that remain."""
        remaining = iter(self._rows)
        while rows := self._read(remaining):
            order = random.Random(f"{self._seed} {self._block}").sample(range(len(rows)), len(rows))
            for index in order[self._taken :]:
                self._taken += 1
                yield rows[index]
            self._start, self._block, self._taken = self._rows.state_dict(), self._block + 1, 0

    def _read(self, remaining: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
        from datasets import logging as datasets_logging

        level = datasets_logging.get_verbosity()
        # The reader would log the whole path of a file it cannot parse.
        datasets_logging.set_verbosity(datasets_logging.CRITICAL)
        try:
            return list(islice(remaining, self._size))
        except Exception as error:
            raise _unreadable(self._source, self._files) from _shown(error, self._files)
        finally:
            datasets_logging.set_verbosity(level)
