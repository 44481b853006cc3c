"""The ablation without coordination: dense models' feed-forward networks, plugged into the anchor as they are."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.baselines.dense_experts import RouterStart, combine, of_anchor


def build_no_coordination(
    anchor: str | os.PathLike,
    experts: Mapping[str, str | os.PathLike],
    output_dir: str | os.PathLike,
    *,
    router_embeddings: Mapping[str, Any] | None = None,
    seed: int = 0,
    experts_per_token: int | None = None,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Plug dense models' feed-forward networks into the anchor as experts (arXiv 2507.07024, ablation).

    The dense models were trained with nothing frozen, so their networks have never met the anchor's shared weights:
    what FlexOlmo's training beside the frozen public expert is worth shows in the difference. Nothing is trained here.

    Args:
        anchor: The public model, a dense OLMo-2 checkpoint; all shared weights are its own.
        experts: Dense OLMo-2 checkpoints by the name each expert shall have.
        output_dir: A folder that does not exist yet or is empty.
        router_embeddings: Router rows by expert, as `domain_embedding` returns them, ``"public"`` included; None draws
            small random ones.
        seed: Of random rows.
        experts_per_token: How many experts each token uses; None for all.
        max_shard_size: Largest weight file.

    Returns:
        `output_dir` as a path: a FlexOlmo checkpoint.

    Raises:
        FlexOlmoError: The kind that fits, as `combine`.
    """
    start = RouterStart(router_embeddings, seed, experts_per_token)
    return combine(anchor, experts, output_dir, shared=of_anchor, start=start, max_shard_size=max_shard_size)
