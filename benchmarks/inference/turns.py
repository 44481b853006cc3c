"""Contestants take turns, so that a machine whose speed drifts is as fast for one as for the other."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: A way of stock's that takes so many times as long as its best in the warm-up is not run again.
HOPELESS = 2.0
STOCK = "stock, "
_START = time.monotonic()

Contestants = Mapping[str, Callable[[], float]]


def say(text: str) -> None:
    """Print progress with the minutes and seconds since the start."""
    minutes, seconds = divmod(int(time.monotonic() - _START), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


@dataclass(frozen=True)
class Outcome:
    """What contestants took.

    Attributes:
        runs: Every timed run, by contestant.
        given_up: The last warm-up of those that were too slow to go on.
    """

    runs: dict[str, list[float]]
    given_up: dict[str, float]

    def median(self, name: str) -> float:
        """Return a contestant's median."""
        return statistics.median(self.runs[name])

    @property
    def best_of_stock(self) -> str:
        """The fastest of stock's ways."""
        return min((name for name in self.runs if name.startswith(STOCK)), key=self.median)

    def against_stock(self) -> dict[str, Any]:
        """Return ours beside stock's best, in seconds, with all runs."""
        best = self.best_of_stock
        return {
            "ours": self.median("ours"),
            "stock": self.median(best),
            "stock_best": best.removeprefix(STOCK),
            "runs": self.runs,
            "given_up": self.given_up,
        }


def take_turns(contestants: Contestants, *, rounds: int, warm_ups: int) -> Outcome:
    """Run every contestant once per round, each second round in the opposite order.

    Args:
        contestants: What to run, by name; each returns its own seconds. Names of stock's ways begin with `STOCK`.
        rounds: Timed rounds.
        warm_ups: Rounds before, which decide who goes on.
    """
    names, given_up = list(contestants), dict[str, float]()
    for _ in range(warm_ups):
        warm = {name: contestants[name]() for name in names}
        given_up |= {name: warm[name] for name in too_slow(warm)}
        names = [name for name in names if name not in given_up]
    runs: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            runs[name].append(contestants[name]())
    return Outcome(runs, given_up)


def too_slow(seconds: Mapping[str, float]) -> Sequence[str]:
    """Name stock's ways that cannot become its best."""
    ways = {name: taken for name, taken in seconds.items() if name.startswith(STOCK)}
    return [name for name, taken in ways.items() if taken > HOPELESS * min(ways.values())]
