"""Sets of experts on one model: a part of it, a set for each row, a live switch, and the machine's own limit."""

import statistics
from collections.abc import Callable
from itertools import combinations
from typing import Any

from benchmarks.inference.memory import SUBSET
from benchmarks.inference.processes import Worker
from benchmarks.inference.settings import Settings
from benchmarks.inference.turns import Outcome, say, take_turns

NAMES = ["public", *(f"expert_{index}" for index in range(1, 7))]
#: Four rows of four experts each; between them they use all seven.
FOUR_SETS = [[NAMES[index] for index in row] for row in ((0, 1, 2, 3), (0, 4, 5, 6), (1, 2, 4, 5), (0, 3, 5, 6))]
TWO_SETS = [NAMES[:4], NAMES[:4], NAMES[3:], NAMES[3:]]


def decoding(worker: Worker, settings: Settings, batch: int, **sets: Any) -> Callable[[], float]:
    """Return the request for one run of decoding."""
    case = {"prompt": settings.prompt, "batch": batch, "new_tokens": settings.new_tokens, "implementation": "auto"}
    return lambda: float(worker.ask("decode", **case, **sets))


def medians(outcome: Outcome) -> dict[str, Any]:
    """Return each contestant's median beside all runs."""
    return {**{name: outcome.median(name) for name in outcome.runs}, "runs": outcome.runs}


def parts(ours: Worker, subset: Worker, settings: Settings) -> dict[str, Any]:
    """Time decoding with all experts, with two that alone were loaded, and with two that were switched to."""
    contestants = {
        "all": decoding(ours, settings, 1),
        "loaded": decoding(subset, settings, 1),
        "switched": decoding(ours, settings, 1, active=SUBSET),
    }
    outcome = take_turns(contestants, rounds=settings.rounds, warm_ups=settings.warm_ups)
    say("decoding with 2 of 7 experts: done")
    return medians(outcome)


def rows(ours: Worker, settings: Settings) -> dict[str, Any]:
    """Time a batch of four in which each row has a set of its own, two share each of two sets, or all share all."""
    contestants = {
        "one": decoding(ours, settings, 4),
        "two": decoding(ours, settings, 4, rows=TWO_SETS),
        "four": decoding(ours, settings, 4, rows=FOUR_SETS),
    }
    outcome = take_turns(contestants, rounds=settings.rounds, warm_ups=settings.warm_ups)
    say("a set for each row: done")
    return medians(outcome)


def switch(ours: Worker) -> dict[str, float]:
    """Switch among all sets of three; the longest switch counts, in seconds."""
    taken: dict[str, float] = ours.ask("switch", sets=list(combinations(NAMES, 3)), times=5)
    say(f"live switch: {taken}")
    return taken


def bandwidth(ours: Worker, settings: Settings) -> dict[str, Any]:
    """Time decoding one row in turns with plain reads of memory.

    Returns:
        ``decode`` in seconds per token, ``sum`` and ``mv`` in bytes per second, all medians.
    """
    runs: dict[str, list[float]] = {"decode": [], "sum": [], "mv": []}
    decode = decoding(ours, settings, 1)
    decode()
    for _ in range(settings.rounds):
        runs["decode"].append(decode())
        read = ours.ask("bandwidth", size=settings.buffer, inner=settings.main.inner, hidden=settings.main.hidden)
        runs["sum"].append(read["sum"])
        runs["mv"].append(read["mv"])
    say("bandwidth: done")
    return {**{name: statistics.median(of) for name, of in runs.items()}, "runs": runs}
