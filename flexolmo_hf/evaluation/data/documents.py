"""Documents on disk: one JSON object with the field ``text`` per line."""

import json
from collections.abc import Iterable
from pathlib import Path


def write_documents(path: Path, texts: Iterable[str]) -> None:
    """Write documents as JSON lines, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf8") as file:
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def read_documents(path: Path) -> list[str]:
    """Read documents back from JSON lines."""
    # Not splitlines(): Unicode line separators may stand unescaped inside a JSON string.
    with path.open(encoding="utf8", newline="\n") as file:
        return [json.loads(line)["text"] for line in file]
