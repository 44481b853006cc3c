"""Where the study lies on disk, and what is done: a step is done when its result is there."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.flexmix_mini.settings import StudySettings
from flexolmo_hf.evaluation.data.corpus import Corpus


@dataclass(frozen=True)
class Place:
    """The study's folder: ``corpus``, ``models/NAME`` and ``results/NAME.json``."""

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
        file = self.file(step)
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        with partial.open("w", encoding="utf8") as out:
            json.dump({"seconds": round(seconds, 2), "found": found}, out)
            out.flush()
            os.fsync(out.fileno())
        os.replace(partial, file)
