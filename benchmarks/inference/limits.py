"""How fast the machine could be: the time that a case's matrix products alone take, done in the best way there is."""

import statistics
from typing import Any

from benchmarks.inference.processes import Worker
from benchmarks.inference.settings import Settings


def limit(ours: Worker, settings: Settings, weights: dict[str, int], *, per_token: int, **case: Any) -> float:
    """Return the seconds that the products of a case take: every used matrix once, with as many rows as it gets.

    After a prefill the logits of each row's last token are asked for: the head and the last layer's experts, whose
    outcome no other token reads, get these tokens alone.

    Args:
        ours: A worker on this machine.
        settings: How often to measure, and the shapes.
        weights: Bytes by kind.
        per_token: Experts per token.
        **case: The request to the workers.
    """
    shape, rows = settings.main, case["batch"]
    tokens = rows * (case["tokens"] if case["do"] == "prefill" else 1)
    per_byte = _Rate(ours, settings)
    head = shape.vocabulary * shape.hidden * 4
    experts_of_layer = weights["experts"] * weights["expert"] / shape.layers

    def of_experts(tokens: int) -> float:
        # A token chooses its experts as if at random; with few tokens, some experts get none.
        share = 1 - (1 - per_token / weights["experts"]) ** tokens
        each = max(1, round(tokens * per_token / (weights["experts"] * share)))
        return share * experts_of_layer * per_byte(each)

    shared = (weights["always"] - head) * per_byte(tokens) + head * per_byte(rows)
    return shared + (shape.layers - 1) * of_experts(tokens) + of_experts(rows)


class _Rate:
    """The seconds per byte of multiplying so many rows by matrices, each number of rows measured once."""

    def __init__(self, ours: Worker, settings: Settings):
        self.ours, self.settings = ours, settings
        self.found: dict[int, float] = {}

    def __call__(self, rows: int) -> float:
        if rows not in self.found:
            self.found[rows] = _seconds_per_byte(self.ours, self.settings, rows)
        return self.found[rows]


def _seconds_per_byte(ours: Worker, settings: Settings, rows: int) -> float:
    shape = settings.main
    # Products of many rows take long however few bytes they read.
    size = settings.buffer if rows < 32 else settings.buffer // 8
    case = {"size": size, "inner": shape.inner, "hidden": shape.hidden, "rows": rows}
    return statistics.median(float(ours.ask("products", **case)) for _ in range(settings.rounds))
