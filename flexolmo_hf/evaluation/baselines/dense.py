"""Continued dense training: what each owner would do without FlexOlmo, and the parts of soups, ensembles and BTX."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.baselines.training import TrainingSettings


def train_dense(
    model_path: str | Path,
    texts: Sequence[str],
    output_dir: str | Path,
    settings: TrainingSettings,
    *,
    trains: str = "everything",
    **options: Any,
) -> Path:
    """Continue the pretraining of a dense model on one owner's texts (arXiv 2507.07024).

    Args:
        model_path: The public model, a dense OLMo-2 checkpoint.
        texts: The owner's documents.
        output_dir: A folder that does not exist yet or is empty.
        settings: How to train.
        trains: ``"everything"``, or ``"feed_forward"`` for the feed-forward networks alone.
        **options: ``tokenizer``, ``run_dir`` and ``resume``, as in `train_whole`.

    Returns:
        `output_dir` as a path: a dense checkpoint with its tokenizer.

    Raises:
        FlexOlmoError: The kind that fits, as `train_whole`.
    """
    from flexolmo_hf._extras import require

    require("train", "trl", "datasets")
    from flexolmo_hf.evaluation.baselines.whole_model import train_whole

    return train_whole(model_path, texts, output_dir, settings, trains=trains, **options)
