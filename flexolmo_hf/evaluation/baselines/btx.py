"""Branch-Train-MiX (BTX): dense models' networks as experts, the mean of everything else, then training."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.baselines.dense_experts import RouterStart, combine, mean_of_all
from flexolmo_hf.evaluation.baselines.training import TrainingSettings


def build_btx(
    anchor: str | os.PathLike,
    experts: Mapping[str, str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    router_embeddings: Mapping[str, Any] | None = None,
    seed: int = 0,
    experts_per_token: int | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Mix dense models that were trained apart into one mixture (BTX, as compared with in arXiv 2507.07024).

    The anchor is one of the models: its network is the expert ``"public"``, and it counts in the mean.

    Args:
        anchor: The public model, a dense OLMo-2 checkpoint.
        experts: Dense OLMo-2 checkpoints by the name each expert shall have.
        output_dir: A folder that does not exist yet or is empty.
        router_embeddings: Router rows by expert; None draws small random ones, as BTX does.
        seed: Of random rows.
        experts_per_token: How many experts each token uses; None for all.
        max_shard_size: Largest weight file.

    Returns:
        `output_dir` as a path: a FlexOlmo checkpoint, ready for `train_btx`.

    Raises:
        FlexOlmoError: The kind that fits, as `combine`.
    """
    start = RouterStart(router_embeddings, seed, experts_per_token)
    return combine(anchor, experts, output_dir, shared=mean_of_all, start=start, max_shard_size=max_shard_size)


def train_btx(
    folder: str | Path,
    texts: Sequence[str],
    output_dir: str | Path,
    settings: TrainingSettings,
    *,
    trains: str = "everything",
    **options: Any,
) -> Path:
    """Train a mixture of dense models after mixing, which BTX needs and FlexOlmo does not.

    Owners' data cannot be brought together, so here it is trained on public texts alone (arXiv 2507.07024).

    Args:
        folder: What `build_btx` wrote.
        texts: Public documents.
        output_dir: A folder that does not exist yet or is empty.
        settings: How to train.
        trains: ``"everything"``, as BTX does, ``"feed_forward"`` or ``"router"``.
        **options: ``tokenizer``, ``run_dir`` and ``resume``, as in `train_whole`; ``load_balancing_coef``.

    Returns:
        `output_dir` as a path: a FlexOlmo checkpoint with its tokenizer.

    Raises:
        FlexOlmoError: The kind that fits, as `train_whole`.
    """
    from flexolmo_hf._extras import require

    require("train", "trl", "datasets")
    from flexolmo_hf.evaluation.baselines.whole_model import train_whole

    return train_whole(folder, texts, output_dir, settings, trains=trains, **options)
