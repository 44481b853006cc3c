"""The unrestricted mixture: all data in one place, everything trained together. What FlexOlmo gives up is the gap."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.baselines.dense_experts import RouterStart, combine, of_anchor
from flexolmo_hf.evaluation.baselines.training import TrainingSettings


def build_unrestricted_moe(
    anchor: str | os.PathLike,
    experts: Sequence[str],
    output_dir: str | os.PathLike,
    *,
    router_embeddings: Mapping[str, Any] | None = None,
    seed: int = 0,
    experts_per_token: int | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Make the mixture that joint training starts from: every expert a copy of the anchor's network.

    Before training it computes what the anchor does. Rows have to differ: experts that start equal and are weighed
    equally receive equal gradients, and stay one expert for good.

    Args:
        anchor: The public model, a dense OLMo-2 checkpoint.
        experts: Names of the experts beside ``"public"``. They are names only, since every expert sees all data.
        output_dir: A folder that does not exist yet or is empty.
        router_embeddings: Router rows by expert, different ones; None draws small random ones.
        seed: Of random rows.
        experts_per_token: How many experts each token uses; None for all, as in FlexOlmo.
        max_shard_size: Largest weight file.

    Returns:
        `output_dir` as a path: a FlexOlmo checkpoint.

    Raises:
        FlexOlmoError: The kind that fits, as `combine`.
    """
    start = RouterStart(router_embeddings, seed, experts_per_token)
    copies = dict.fromkeys(experts, anchor)
    return combine(anchor, copies, output_dir, shared=of_anchor, start=start, max_shard_size=max_shard_size)


def train_unrestricted_moe(
    folder: str | Path,
    texts: Sequence[str],
    output_dir: str | Path,
    settings: TrainingSettings,
    *,
    trains: str = "everything",
    **options: Any,
) -> Path:
    """Train a mixture on the data of all owners together (arXiv 2507.07024): an upper bound, since nobody may do it.

    How many tokens are a fair comparison, `compute_matched` and `data_matched` say.

    Args:
        folder: What `build_unrestricted_moe` wrote.
        texts: The documents of all owners, public ones too if they shall be seen. Sequences are cut from them in this
            order and then shuffled.
        output_dir: A folder that does not exist yet or is empty.
        settings: How to train.
        trains: ``"everything"``, or ``"feed_forward"`` for experts and router alone, which is what FlexOlmo moves.
        **options: ``tokenizer``, ``run_dir`` and ``resume``, as in `train_whole`; ``load_balancing_coef``, for mixtures
            whose tokens use fewer experts than there are.

    Returns:
        `output_dir` as a path: a FlexOlmo checkpoint with its tokenizer.

    Raises:
        FlexOlmoError: The kind that fits, as `train_whole`.
    """
    from flexolmo_hf._extras import require

    require("train", "trl", "datasets")
    from flexolmo_hf.evaluation.baselines.whole_model import train_whole

    return train_whole(folder, texts, output_dir, settings, trains=trains, **options)
