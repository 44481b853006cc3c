"""One demand of a contract, and what became of it."""

from dataclasses import asdict, dataclass

AT_LEAST, AT_MOST, EITHER_WAY = "at least", "at most", "by at most"

KEPT, UNSURE, BROKEN = "kept", "unsure", "broken"


@dataclass(frozen=True)
class Demand:
    """What is agreed on one number of the matrix.

    Attributes:
        set: The row.
        data: The data set.
        rule: "at least" and "by at most" (either way) are about changes in percent, "at most" about bits per byte.
        limit: The number agreed on.
    """

    set: str
    data: str
    rule: str
    limit: float


@dataclass(frozen=True)
class Clause(Demand):
    """A demand, what was measured, and what follows.

    Attributes:
        measured: What was measured.
        low: Lower end of its interval.
        high: Upper end of its interval.
        verdict: "kept", "broken", or "unsure": the value is on the wrong side, but its interval is not wholly.
    """

    measured: float
    low: float
    high: float
    verdict: str

    def __str__(self) -> str:
        if self.rule == AT_MOST:
            return (
                f"{self.verdict}: {self.data} needs {self.measured:.3f} bits per byte with {self.set} "
                f"[{self.low:.3f}, {self.high:.3f}]; agreed: at most {self.limit:g}"
            )
        way = "worse by at least" if self.rule == AT_LEAST else "better or worse by at most"
        return (
            f"{self.verdict}: {self.data} changes by {self.measured:+.2f} % {self.set} "
            f"[{self.low:+.2f}, {self.high:+.2f}]; agreed: {way} {self.limit:g} %"
        )


def judge(demand: Demand, measured: float, low: float, high: float, *, by_value: bool) -> Clause:
    """Hold a measured number and its interval against a demand.

    Args:
        demand: What is agreed.
        measured: The number.
        low: Lower end of its interval.
        high: Upper end of its interval.
        by_value: Whether the value decides, and not the interval.
    """
    verdict = KEPT
    # What is not a number keeps no promise.
    if not _within(demand, measured, measured):
        verdict = BROKEN if by_value or not _within(demand, low, high) else UNSURE
    return Clause(**asdict(demand), measured=measured, low=low, high=high, verdict=verdict)


def _within(demand: Demand, low: float, high: float) -> bool:
    """Tell whether any number between two ends is as demanded."""
    if demand.rule == AT_LEAST:
        return high >= demand.limit
    if demand.rule == AT_MOST:
        return low <= demand.limit
    return low <= demand.limit and high >= -demand.limit
