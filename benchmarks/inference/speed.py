"""Prefill and decoding against the best of stock's ways to run its experts."""

from collections.abc import Callable
from typing import Any

from benchmarks.inference.limits import limit
from benchmarks.inference.processes import Worker
from benchmarks.inference.settings import Settings, Shape
from benchmarks.inference.turns import STOCK, say, take_turns

IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")
#: Stock's batched_mm copies the chosen experts' matrices for each token; beyond so many bytes it is left out.
LARGEST_COPY = 2_000_000_000
TOLERANCE = 1e-3


def fitting(shape: Shape, tokens: int, per_token: int) -> list[str]:
    """Return stock's ways to run so many tokens without copying more than fits."""
    copied = tokens * per_token * 3 * shape.inner * shape.hidden * 4
    return [name for name in IMPLEMENTATIONS if name != "batched_mm" or copied <= LARGEST_COPY]


def check_agreement(ours: Worker, stock: Worker, tokens: int) -> None:
    """Make sure that both compute the same, or the comparison would mean nothing.

    Raises:
        RuntimeError: If their logits differ by more than rounding.
    """
    pairs = zip(ours.ask("logits", tokens=tokens), stock.ask("logits", tokens=tokens), strict=True)
    apart = max(abs(mine - theirs) for mine, theirs in pairs)
    # Written so that NaN is refused too.
    if not apart < TOLERANCE:
        raise RuntimeError(f"The logits of ours and stock differ by {apart:.2g}; {TOLERANCE} would be rounding.")


def compare(
    ours: Worker, stock: Worker, settings: Settings, shape: Shape, *, per_token: int, **case: Any
) -> dict[str, Any]:
    """Let ours and each of stock's ways run one case in turns.

    Args:
        ours: Holds the model.
        stock: Holds the same checkpoint.
        settings: How often.
        shape: The checkpoint's.
        per_token: Experts per token, as loaded.
        **case: The request to the workers, without its implementation.

    Returns:
        The seconds of ours and of stock's best, its name, and all runs.
    """

    def run(worker: Worker, implementation: str) -> Callable[[], float]:
        return lambda: float(worker.ask(**case, implementation=implementation))

    tokens = case["batch"] * (case["tokens"] if case["do"] == "prefill" else 1)
    contestants = {"ours": run(ours, "auto")}
    contestants |= {f"{STOCK}{name}": run(stock, name) for name in fitting(shape, tokens, per_token)}
    outcome = take_turns(contestants, rounds=settings.rounds, warm_ups=settings.warm_ups).against_stock()
    milliseconds = {who: f"{outcome[who] * 1000:.3g} ms" for who in ("ours", "stock")}
    length = case.get("tokens", case.get("prompt"))
    what = f"{case['do']}, batch {case['batch']}, {length} tokens, {per_token} experts per token"
    say(f"{what}: ours {milliseconds['ours']}, stock's {outcome['stock_best']} {milliseconds['stock']}")
    return {"case": case, "per_token": per_token, **outcome}


def measure(
    ours: Worker, stock: Worker, folder: str, settings: Settings, weights: dict[str, int]
) -> list[dict[str, Any]]:
    """Compare a prefill, and decoding in each batch size, for each number of experts per token."""
    results = []
    for per_token in settings.per_token:
        for worker in (ours, stock):
            worker.ask("load", folder=folder, per_token=per_token)
        check_agreement(ours, stock, settings.prompt)
        cases: list[dict[str, Any]] = [{"do": "prefill", "tokens": settings.prefill, "batch": 1}]
        cases += [
            {"do": "decode", "prompt": settings.prompt, "batch": batch, "new_tokens": settings.new_tokens}
            for batch in settings.batches
        ]
        for case in cases:
            entry = compare(ours, stock, settings, settings.main, per_token=per_token, **case)
            entry["limit"] = limit(ours, settings, weights, per_token=per_token, **case)
            results.append(entry)
    return results
