"""What each method took to train, to hold and to run."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from benchmarks.flexmix_mini.measuring import PUBLIC
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.steps import METHOD
from benchmarks.flexmix_mini.tables import METHODS

#: Methods that hold every dense model as a whole.
_ENSEMBLES = ("weighted soup", "BTM top-2", "BTM all", "prompt routing")


@dataclass(frozen=True)
class Cost:
    """What one method cost.

    Attributes:
        label: The method.
        parameters: Parameters to hold, those of an average included, those of a chat model not.
        trained: Core seconds of everything that was trained for it, by all owners together.
        tokens: Tokens that this training saw.
        seconds: Core seconds of reading the public test texts, by a model of its shape; None if not measured.
    """

    label: str
    parameters: int
    trained: float
    tokens: int
    seconds: float | None


def costs(place: Place, table: str) -> Iterator[Cost]:
    """Return what every method of a table cost that has been measured, in the table's order.

    Args:
        place: The study.
        table: ``"t1"`` or ``"t2"``.
    """
    seed, running = place.settings.seeds[0], f"running-cost-{table}"
    measured = place.result(running) if place.is_done(running) else {}
    public: int = place.result(PUBLIC)["parameters"]
    for label in METHODS:
        steps = _training(place, table, label)
        if not place.is_done(f"score-{table}-{seed}-{label}") or not all(place.is_done(step) for step in steps):
            continue
        found = [place.result(step) for step in steps]
        ran = measured.get(label)
        members = len(_owners(place, table)) + 1 if label in _ENSEMBLES else 1
        held = [result["parameters"] for result in found if "parameters" in result]
        yield Cost(
            label,
            ran["parameters"] if ran else held[-1] if held else members * public,
            sum(place.seconds(step) for step in steps),
            place.settings.public_tokens if label == PUBLIC else sum(result.get("tokens", 0) for result in found),
            median(ran["seconds"]) if ran else None,
        )


def _owners(place: Place, table: str) -> tuple[str, ...]:
    return place.settings.table_1 if table == "t1" else place.settings.owners


def _training(place: Place, table: str, label: str) -> list[str]:
    """Name the steps that made a method's model; the public model's own training is in all of them."""
    seed, owners = place.settings.seeds[0], _owners(place, table)
    of = f"{table}-{seed}"
    if label == PUBLIC:
        return [PUBLIC]
    if label.startswith("dense "):
        return [f"dense-{label.removeprefix('dense ')}-{seed}"]
    if label.startswith("unrestricted MoE"):
        return [f"moe-{label.rpartition(' ')[2]}-{of}"]
    joined = {"soup": f"soup-{of}", "BTX": f"btx-{of}", "no coordination": f"plugged-{of}"}
    if label in joined or label in _ENSEMBLES:
        dense = [f"dense-{owner}-{seed}" for owner in owners]
        return dense + ([joined[label]] if label in joined else [])
    tuned = label == "router tuning"
    variant = METHOD if tuned or label == "bias dropped" else label
    experts = [f"expert-{variant}-{owner}-{seed}" for owner in owners]
    return [*experts, f"merged-{variant}-{of}", *([f"tuned-{variant}-{of}"] if tuned else [])]


def cost_table(place: Place, table: str) -> str:
    """Return the costs of a table's methods as Markdown."""
    lines = [
        "| | parameters to hold | training, core seconds | tokens seen | reading, core seconds | times public |",
        "|---|---|---|---|---|---|",
    ]
    made = list(costs(place, table))
    of_public = next((cost.seconds for cost in made if cost.label == PUBLIC), None)
    for cost in made:
        known = cost.seconds is not None and of_public
        ran = f"{cost.seconds:.1f} | {cost.seconds / of_public:.1f}x" if known else "| "  # type: ignore[operator]
        lines.append(
            f"| {cost.label} | {cost.parameters / 1e6:.1f} M | {cost.trained:.0f} | {cost.tokens / 1e6:.1f} M | {ran} |"
        )
    return "\n".join(lines)


def hours(place: Place) -> float:
    """Return the hours of one core that all steps took together."""
    files = (place.root / "results").glob("*.json")
    return float(sum(json.loads(file.read_text("utf8"))["seconds"] for file in files) / 3600)
