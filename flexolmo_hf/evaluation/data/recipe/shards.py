"""Writing a domain's documents: files of limited size that are whole or not there."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


def shard_name(number: int) -> str:
    """Return the file name of a domain's shard."""
    return f"shard-{number:05d}.jsonl"


def dropped_name(number: int) -> str:
    """Return the name of the file that lists what was dropped as contaminated while a shard was filled."""
    return f"contaminated-{number:05d}.txt"


class ShardWriter:
    """Fills one shard after the other.

    Args:
        folder: The domain's folder, made if missing.
        number: Number of the first shard to write.
        limit: Size in bytes from which on a shard is full.
    """

    def __init__(self, folder: Path, *, number: int, limit: int):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self.number, self._limit = folder, number, limit
        self._file: IO[bytes] | None = None
        self._size = 0
        self._dropped: list[str] = []

    def write(self, text: str) -> None:
        """Add a document to the shard."""
        if self._file is None:
            self._file = (self._folder / f".{shard_name(self.number)}.partial").open("wb")
        line = json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"
        self._size += self._file.write(line)

    def drop(self, sha256: str) -> None:
        """Add a document's sha256 to the list of what was contaminated."""
        self._dropped.append(sha256)

    @property
    def full(self) -> bool:
        """Whether the shard has reached its size."""
        return self._size >= self._limit

    def close_shard(self) -> None:
        """Give the shard its final name, if there is anything in it, and begin the next one."""
        if self._dropped:
            (self._folder / dropped_name(self.number)).write_text("".join(f"{name}\n" for name in self._dropped))
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._file.name, self._folder / shard_name(self.number))
        if self._dropped or self._file is not None:
            self.number += 1
        self._file, self._size, self._dropped = None, 0, []

    def abandon(self) -> None:
        """Let go of a shard that is not whole."""
        if self._file is not None:
            self._file.close()


def read_shards(folder: Path, count: int) -> Iterator[str]:
    """Yield the documents of a domain's first shards."""
    for number in range(count):
        # A shard may consist of dropped documents only.
        if (folder / shard_name(number)).exists():
            with (folder / shard_name(number)).open(encoding="utf8", newline="\n") as lines:
                for line in lines:
                    yield json.loads(line)["text"]


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is whole or the former one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf8")
    os.replace(partial, path)


def read_json(path: Path) -> Any:
    """Read JSON back, or None where nothing was written."""
    return json.loads(path.read_text("utf8")) if path.exists() else None
