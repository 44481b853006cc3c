"""How fast the machine could be: the time that a case's matrix products alone take, done in the best way there is."""

import statistics
from typing import Any

from benchmarks.inference.processes import Worker
from benchmarks.inference.settings import Settings


def limit(ours: Worker, settings: Settings, weights: dict[str, int], *, per_token: int, **case: Any) -> float:
    """Return the seconds that the products of a case take: every used matrix once, with as many rows as it gets.

    Args:
        ours: A worker on this machine.
        settings: How often to measure, and the shapes.
        weights: Bytes by kind.
        per_token: Experts per token.
        **case: The request to the workers.
    """
    experts = weights["experts"]
    tokens = case["batch"] * (case["tokens"] if case["do"] == "prefill" else 1)
    # A token chooses its experts as if at random; with few tokens, some experts get none.
    used = experts * (1 - (1 - per_token / experts) ** tokens)
    rows = max(1, round(tokens * per_token / used))
    shared, of_experts = _seconds_per_byte(ours, settings, tokens), _seconds_per_byte(ours, settings, rows)
    return weights["always"] * shared + used * weights["expert"] * of_experts


def _seconds_per_byte(ours: Worker, settings: Settings, rows: int) -> float:
    shape = settings.main
    # Products of many rows take long however few bytes they read.
    size = settings.buffer if rows < 32 else settings.buffer // 8
    case = {"size": size, "inner": shape.inner, "hidden": shape.hidden, "rows": rows}
    return statistics.median(float(ours.ask("products", **case)) for _ in range(settings.rounds))
