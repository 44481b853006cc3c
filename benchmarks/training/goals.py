"""The goals, and what was reached of each."""

from typing import Any

from benchmarks.inference.goals import Goal

#: Stock's time over ours.
SPEED = 1.25
#: Our peak over stock's.
MEMORY = 0.7
#: The trainer's time over a bare loop's.
OVERHEAD = 1.15
#: How far the planned operations may be from the counted ones.
COUNT = 0.02
#: Operations per second of a step over those of its products alone.
RATE = 0.7
#: AdamW's two moments, in float32.
MOMENT_BYTES = 2 * 4


def goals(results: dict[str, Any]) -> list[Goal]:
    """Set every goal beside its figure, in the order of the page."""
    speed, peaks, state = results["speed"], results["memory"]["medians"], results["state"]
    times = speed["stock"] / speed["ours"]
    share = peaks["ours"] / peaks["stock"]
    overhead = speed["trainer"] / speed["ours"]
    apart = abs(results["operations"]["planned"] / results["operations"]["counted"] - 1)
    reached = rate_fraction(results)
    exact = all(of["moments"] == MOMENT_BYTES * results["trained"] for of in (state["ours"], state["trainer"]))
    return [
        Goal("step: stock's time / ours", f"{times:.2f}x", f"at least {SPEED}x", times >= SPEED),
        Goal("peak memory: ours / stock's", f"{share:.2f}x", f"at most {MEMORY}x", share <= MEMORY),
        Goal(
            "bytes of optimizer state",
            f"{state['ours']['moments']:,}",
            f"exactly {MOMENT_BYTES} x {results['trained']:,} trained parameters",
            exact,
        ),
        Goal(
            f"vocabulary {results['settings']['wide']['vocabulary']:,}: largest tensor of a step / all logits",
            f"{largest_share(results):.0%}",
            "below 100%",
            largest_share(results) < 1,
        ),
        Goal("operations: planned / counted by torch", f"{apart:.2%} apart", f"at most {COUNT:.0%}", apart <= COUNT),
        Goal(
            "operations per second / those of the products alone",
            f"{reached:.0%}",
            f"at least {RATE:.0%}",
            reached >= RATE,
        ),
        Goal(
            "step: the trainer's time / the bare loop's",
            f"{overhead:.2f}x",
            f"at most {OVERHEAD}x",
            overhead <= OVERHEAD,
        ),
    ]


def rate_fraction(results: dict[str, Any]) -> float:
    """Return the operations per second of a bare step, over those that its products alone reach."""
    return rate(results, "ours") / rate(results, "products")


def rate(results: dict[str, Any], who: str) -> float:
    """Return operations per second, of a step or of its products alone."""
    operations = results["operations"]["products" if who == "products" else "planned"]
    return float(operations / results["speed"][who])


def largest_share(results: dict[str, Any]) -> float:
    """Return the largest tensor of a trainer's step over the logits of all positions that predict a token."""
    settings = results["settings"]
    logits = settings["batch"] * (settings["tokens"] - 1) * settings["wide"]["vocabulary"]
    return float(results["wide"]["elements"] / logits)
