"""Where the study lies on disk, and what is done: a step is done when its result is there."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.flexmix_mini.settings import StudySettings
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.corpus import Corpus

#: The file with the settings that a folder's results are of.
SETTINGS = "settings.json"
#: The file that a running study holds.
LOCK = ".lock"


@dataclass(frozen=True)
class Place:
    """The study's folder.

    In it lie ``settings.json``, ``corpus``, ``tokenizer``, ``models/NAME`` and ``results/NAME.json``; ``runs``,
    ``levers`` and ``logs``, which steps work in; ``.lock``, which a running study holds.
    """

    root: Path
    settings: StudySettings

    @property
    def corpus_folder(self) -> Path:
        """Name the folder of the texts."""
        return self.root / "corpus"

    @property
    def corpus(self) -> Corpus:
        """Open the texts."""
        return Corpus.open(self.corpus_folder)

    @property
    def tokenizer(self) -> Path:
        """Name the folder of the tokenizer."""
        return self.root / "tokenizer"

    def model(self, name: str) -> Path:
        """Name the folder of a model, a package or rows."""
        return self.root / "models" / name

    def file(self, step: str) -> Path:
        """Name the file of a step's result."""
        return self.root / "results" / f"{step}.json"

    def is_done(self, step: str) -> bool:
        """Tell whether a step has been done."""
        return self.file(step).is_file()

    def result(self, step: str) -> Any:
        """Read what a step found."""
        return json.loads(self.file(step).read_text("utf8"))["found"]

    def seconds(self, step: str) -> float:
        """Read how long a step took on one core."""
        return float(json.loads(self.file(step).read_text("utf8"))["seconds"])

    def finish(self, step: str, found: Any, seconds: float) -> None:
        """Write a step's result, whole or not at all."""
        _write_whole(self.file(step), {"seconds": round(seconds, 2), "found": found})

    def clear(self, paths: Iterable[str]) -> None:
        """Remove files and folders of the study, and what a killed process left of them.

        Args:
            paths: Below the study's folder; those that are not there are passed over.
        """
        for path in (self.root / path for path in paths):
            # `new_folder` writes beside the final place, under such a name.
            for left in (path, *path.parent.glob(f".{path.name}.partial-*")):
                if left.is_dir() and not left.is_symlink():
                    shutil.rmtree(left)
                else:
                    left.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other studies out of the folder: two would remove what each other is writing.

        Raises:
            ConfigurationError: If one is running there.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / LOCK)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigurationError(
                f"Another study is running in {self.root.name!r}.", "Wait until it ends, or give another --output."
            ) from None
        try:
            yield
        finally:
            lock.release()

    def keep_settings(self) -> None:
        """Note the settings in a folder that has no note, and refuse one that was begun with others.

        Raises:
            ConfigurationError: If the folder's settings are others, with what differs, or cannot be read.
        """
        file, here = self.root / SETTINGS, _plain(self.settings)
        if not file.is_file():
            _write_whole(file, {"sha256": _digest(here), "settings": here})
            return
        there = self._noted(file)
        if there != here:
            raise ConfigurationError(
                f"The study in {self.root.name!r} was begun with other settings: {'; '.join(_differing(there, here))}.",
                "Run it with its own settings (with or without --smoke, as at first), or give another --output.",
            )

    def _noted(self, file: Path) -> dict[str, Any]:
        try:
            note = json.loads(file.read_text("utf8"))
            whole = note["sha256"] == _digest(note["settings"])
        except (ValueError, LookupError, TypeError):
            whole = False
        if not whole:
            raise ConfigurationError(
                f"The {file.name} in {self.root.name!r} is not as the study wrote it.",
                "If the results there are of the settings of this run, delete the file; else give another --output.",
            )
        settings: dict[str, Any] = note["settings"]
        return settings


def _plain(settings: StudySettings) -> dict[str, Any]:
    """Return settings as they are read back from JSON, where tuples are lists."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _differing(there: dict[str, Any], here: dict[str, Any], above: str = "") -> Iterator[str]:
    for name in {**there, **here}:
        old, new = there.get(name, "not set"), here.get(name, "not set")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _differing(old, new, f"{above}{name}.")
        elif old != new:
            yield f"{above}{name} is {old} there and {new} here"


def _write_whole(file: Path, content: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    try:
        with partial.open("w", encoding="utf8") as out:
            json.dump(content, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
    except BaseException:
        # A full disk needs the room.
        partial.unlink(missing_ok=True)
        raise
