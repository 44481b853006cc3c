"""What a trainer writes beside a checkpoint: how its expert was trained, for the package's manifest and card."""

import json
import os
from pathlib import Path
from typing import Any

from flexolmo_hf.errors import DamagedFileError

TRAINING_RECORD = "expert_training.json"


def write_training_record(folder: Path, *, training: dict[str, Any], evaluation: dict[str, Any]) -> None:
    """Write the record: numbers and choices, nothing of the data and no path."""
    text = json.dumps({"training": training, "evaluation": evaluation}, indent=2)
    (folder / TRAINING_RECORD).write_text(text + "\n", encoding="utf-8")


def read_training_record(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return what a trainer wrote about the expert of a checkpoint folder, as ``training`` and ``evaluation``.

    Raises:
        DamagedFileError: If the record cannot be read.
    """
    path = Path(folder) / TRAINING_RECORD
    if not path.is_file():
        return {"training": {}, "evaluation": {}}
    try:
        record = json.loads(path.read_text("utf-8"))
        return {"training": dict(record["training"]), "evaluation": dict(record["evaluation"])}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(TRAINING_RECORD, "it is no training record") from error
