"""What a trainer writes beside a checkpoint: how its expert was trained, for the package's manifest and card."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexolmo_hf.composition.fingerprint import AnchorFingerprint
from flexolmo_hf.errors import DamagedFileError

TRAINING_RECORD = "expert_training.json"


@dataclass(frozen=True)
class PostTraining:
    """What a run moved besides its expert (BAR, arXiv 2604.18473).

    Attributes:
        unfrozen: Groups of shared weights: ``embeddings``, ``lm_head``, ``attention``, ``norms``.
        anchor: The anchor as it was before.
    """

    unfrozen: list[str]
    anchor: AnchorFingerprint


def write_training_record(
    folder: Path, *, training: dict[str, Any], evaluation: dict[str, Any], post_training: PostTraining | None = None
) -> None:
    """Write the record: numbers and choices, nothing of the data and no path."""
    moved = {} if post_training is None else {"post_training": asdict(post_training)}
    text = json.dumps({"training": training, "evaluation": evaluation, **moved}, indent=2)
    (folder / TRAINING_RECORD).write_text(text + "\n", encoding="utf-8")


def read_training_record(folder: str | os.PathLike) -> dict[str, Any]:
    """Return what a trainer wrote about the expert of a checkpoint folder.

    Returns:
        ``training``, ``evaluation``, and ``post_training`` if shared weights were trained too.

    Raises:
        DamagedFileError: If the record cannot be read.
    """
    path = Path(folder) / TRAINING_RECORD
    if not path.is_file():
        return {"training": {}, "evaluation": {}}
    try:
        record = json.loads(path.read_text("utf-8"))
        found: dict[str, Any] = {"training": dict(record["training"]), "evaluation": dict(record["evaluation"])}
        if moved := record.get("post_training"):
            found["post_training"] = PostTraining(list(moved["unfrozen"]), AnchorFingerprint(**moved["anchor"]))
        return found
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise DamagedFileError(TRAINING_RECORD, "it is no training record") from error
