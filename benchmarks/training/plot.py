"""The plot: the time of a step, and the peak memory of each contestant."""

from pathlib import Path
from typing import Any

LABELS = {
    "stock": "stock",
    "ours": "ours, bare loop",
    "trainer": "ours, trainer",
    "trainer, as it comes": "ours, trainer,\ncheckpointing",
}
STOCK, OURS = "#c8553d", "#0b6e99"


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw two panels of bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3), layout="constrained")
    speed, peaks = results["speed"], results["memory"]["medians"]
    _bars(left, {who: speed[who] for who in ("stock", "ours", "trainer")})
    left.axvline(speed["products"], color="#666666", linestyle=":", label="ours, the products alone")
    left.set_xlabel("seconds per step (less is better)")
    left.legend(loc="lower right", frameon=True, fontsize="small")
    _bars(right, {who: peaks[who] / 1e6 for who in LABELS})
    right.set_xlabel("peak memory, MB (less is better)")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _bars(panel: Any, values: dict[str, float]) -> None:
    names = [LABELS[who] for who in values]
    panel.barh(names, list(values.values()), color=[STOCK if who == "stock" else OURS for who in values], height=0.6)
    panel.invert_yaxis()
    panel.set_xlim(left=0)
    panel.grid(axis="x", color="#dddddd", linewidth=0.6)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
