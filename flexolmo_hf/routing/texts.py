"""Documents read from files one after the other, for corpora larger than memory."""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from flexolmo_hf.errors import ConfigurationError, DamagedFileError

_KINDS = (".jsonl", ".txt")


def read_texts(places: Iterable[str | os.PathLike], *, field: str = "text") -> Iterator[str]:
    """Yield the documents of files.

    Args:
        places: Files, or folders of files: ``.jsonl`` with an object per line, or ``.txt``, each one document.
        field: The key of the text in an object.

    Raises:
        ConfigurationError: If a file is not there or of another kind, or an object has no such text.
        DamagedFileError: If a file is not UTF-8, or a line no JSON object.
    """
    for file in _files(places):
        try:
            if file.suffix == ".txt":
                yield file.read_text("utf-8")
            else:
                yield from _lines(file, field)
        except UnicodeDecodeError:
            # The cause would carry a piece of the text.
            raise DamagedFileError(file.name, "it is not UTF-8") from None


def _files(places: Iterable[str | os.PathLike]) -> list[Path]:
    files: list[Path] = []
    for place in map(Path, places):
        if place.is_dir():
            found = sorted(path for path in place.rglob("*") if path.suffix in _KINDS and path.is_file())
        else:
            found = [place] if place.suffix in _KINDS and place.is_file() else []
        if not place.exists():
            raise ConfigurationError(
                f"There is no file or folder {place.name!r}.", "Give documents that exist: .jsonl, .txt, or folders."
            )
        if not found:
            raise ConfigurationError(
                f"{place.name!r} is no .jsonl or .txt file, and no folder that holds one.",
                "Give files of these kinds, or folders of them.",
            )
        files += found
    return files


def _lines(file: Path, field: str) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                raise DamagedFileError(file.name, f"line {number} is not JSON") from None
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                raise ConfigurationError(
                    f"Line {number} of {file.name!r} has no text under {field!r}.", "Name the right field with --field."
                )
            yield row[field]
