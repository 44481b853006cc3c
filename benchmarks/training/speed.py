"""A step of each contestant, in turns with the products of a step alone."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.inference.processes import Worker
from benchmarks.inference.turns import STOCK, say, take_turns
from benchmarks.training.settings import Settings

#: Stock's third way, batched_mm, would copy both experts' matrices for each token of a step: gigabytes.
IMPLEMENTATIONS = ("eager", "grouped_mm")
TOLERANCE = 1e-3


def check_agreement(losses: dict[str, float]) -> None:
    """Make sure that all compute the same, or the comparison would mean nothing.

    Raises:
        RuntimeError: If their losses differ by more than rounding.
    """
    apart = max(losses.values()) - min(losses.values())
    # Written so that NaN is refused too.
    if not apart < TOLERANCE:
        raise RuntimeError(f"The losses differ by {apart:.2g}; {TOLERANCE} would be rounding: {losses}")


def measure(workers: dict[str, Worker], settings: Settings) -> dict[str, Any]:
    """Time a step of everyone.

    Args:
        workers: The contestants, loaded: ``stock``, ``stock, frozen``, ``ours`` and ``trainer``.
        settings: How often.

    Returns:
        The medians in seconds, by contestant, ``products`` among them, with all runs; ``stock_best``, how stock's
        experts run fastest; and ``frozen``, stock with what it can freeze frozen, beside ours in a round of their own.
    """

    def step(who: str, implementation: str = "auto") -> Callable[[], float]:
        return lambda: float(workers[who].ask("step", implementation=implementation))

    shape = asdict(settings.main)
    contestants = {
        "ours": step("ours"),
        "trainer": step("trainer"),
        "products": lambda: float(workers["ours"].ask("products", **shape)),
        **{f"{STOCK}{name}": step("stock", name) for name in IMPLEMENTATIONS},
    }
    outcome = take_turns(contestants, rounds=settings.rounds, warm_ups=settings.warm_ups)
    results = outcome.against_stock()
    results |= {name: outcome.median(name) for name in ("trainer", "products")}
    say(f"step: ours {results['ours']:.3g} s, trainer {results['trainer']:.3g} s, stock {results['stock']:.3g} s")
    pair = {"ours": step("ours"), "frozen": step("stock, frozen", results["stock_best"])}
    beside = take_turns(pair, rounds=max(1, settings.rounds // 2), warm_ups=1)
    return {**results, "frozen": {**{name: beside.median(name) for name in pair}, "runs": beside.runs}}
