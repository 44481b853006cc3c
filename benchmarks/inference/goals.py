"""The goals, and what was reached of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

#: Stock's time to load over ours.
LOAD = 8
#: Peak resident memory over the bytes of the weights.
MEMORY = 1.15
#: A part of the experts over what its bytes let expect.
PROPORTION = 1.15
#: Stock's time over ours; or, where there is little left to gain, the limit's time over both.
SPEED, OF_LIMIT = 1.05, 0.9
#: A set for each row over one set that reads the same bytes.
ROWS = 1.05
#: Seconds.
SWITCH = 0.001
#: Bytes read while decoding over what the machine can read in that time.
BANDWIDTH = 0.7


@dataclass(frozen=True)
class Goal:
    """One line of the table: what was measured, the figure, the goal, and whether it was met."""

    title: str
    figure: str
    goal: str
    met: bool


def goals(results: dict[str, Any]) -> list[Goal]:
    """Set every goal beside its figure, in the order of the page."""
    return [*_speed(results), *_memory(results), *_parts(results), *_rows(results), *_limits(results)]


def case_title(entry: dict[str, Any], experts: int) -> str:
    """Name a case of the comparison with stock."""
    case, of = entry["case"], f"{entry['per_token']} of {experts} experts per token"
    if case["do"] == "prefill":
        return f"prefill of {case['tokens']} tokens, {of}"
    return f"decoding, batch {case['batch']}, {of}"


def expected_part(weights: dict[str, int], used: int) -> float:
    """Return the share of the bytes that is read with some of the experts."""
    read = weights["always"] + used * weights["expert"]
    return read / (weights["always"] + weights["experts"] * weights["expert"])


def part_of_files(weights: dict[str, int], used: int) -> float:
    """Return the share of the files' bytes that a load with some of the experts opens, the whole embedding included."""
    return (weights["embedding"] + weights["always"] + used * weights["expert"]) / weights["total"]


def read_fraction(results: dict[str, Any]) -> float:
    """Return which fraction of the machine's bandwidth decoding one row reaches."""
    weights, measured = results["weights"], results["bandwidth"]
    read = weights["always"] + weights["experts"] * weights["expert"]
    return float(read / measured["decode"] / max(measured["sum"], measured["mv"]))


def _at_most(title: str, value: float, limit: float, text: str) -> Goal:
    return Goal(title, text.format(value), "at most " + text.format(limit), value <= limit)


def _speed(results: dict[str, Any]) -> Iterator[Goal]:
    for entry in results["speed"]:
        times = entry["stock"] / entry["ours"]
        reached, by_stock = (entry["limit"] / entry[who] for who in ("ours", "stock"))
        title = f"{case_title(entry, results['weights']['experts'])}: stock's time / ours; share of the machine's limit"
        goal = f"at least {SPEED}x, or {OF_LIMIT:.0%} where stock reaches it too"
        met = times >= SPEED or min(reached, by_stock) >= OF_LIMIT
        yield Goal(title, f"{times:.2f}x; {reached:.0%}", goal, met)


def _memory(results: dict[str, Any]) -> Iterator[Goal]:
    times = results["memory"]["medians"]["stock"]["load_s"] / results["memory"]["medians"]["ours"]["load_s"]
    yield Goal("load: stock's time / ours", f"{times:.1f}x", f"at least {LOAD}x", times >= LOAD)
    # Above the start: what the libraries need is the same for stock, and depends on which are installed.
    peak = results["memory"]["medians"]["ours"]["growth"] / results["weights"]["total"]
    yield _at_most("peak memory above the start / weights", peak, MEMORY, "{:.2f}x")


def _parts(results: dict[str, Any]) -> Iterator[Goal]:
    part, memory, decode = expected_part(results["weights"], 2), results["memory"]["medians"], results["parts"]
    loaded, everything = memory["subset"], memory["ours"]
    shares = {
        "load": (loaded["load_s"] / everything["load_s"], part),
        "load and first forward": (loaded["ready_s"] / everything["ready_s"], part),
        "load and first forward, from disk": (
            loaded["disk_ready_s"] / everything["disk_ready_s"],
            part_of_files(results["weights"], 2),
        ),
        "memory above the start": (loaded["growth"] / everything["growth"], part),
        "decoding, loaded": (decode["loaded"] / decode["all"], part),
        "decoding, switched": (decode["switched"] / decode["all"], part),
    }
    for title, (share, expected) in shares.items():
        yield _at_most(f"2 of 7, {title}: measured / expected from bytes", share / expected, PROPORTION, "{:.2f}x")


def _rows(results: dict[str, Any]) -> Iterator[Goal]:
    taken = results["rows"]
    for name in ("two", "four"):
        title = f"{name} sets in a batch of four / one set of all seven"
        yield _at_most(title, taken[name] / taken["one"], ROWS, "{:.2f}x")


def _limits(results: dict[str, Any]) -> Iterator[Goal]:
    for name, title in (("first", "to a set that was not in force before"), ("again", "to one that was")):
        yield _at_most(f"longest live switch {title}", results["switch"][name] * 1000, SWITCH * 1000, "{:.2g} ms")
    reached = read_fraction(results)
    title = "decoding one row: share of the memory's bandwidth"
    yield Goal(title, f"{reached:.0%}", f"at least {BANDWIDTH:.0%}", reached >= BANDWIDTH)
