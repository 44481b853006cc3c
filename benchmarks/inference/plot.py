"""The plot: how prefill and decoding grow, ours and stock's best."""

from pathlib import Path
from typing import Any

from benchmarks.inference.page import GROWTH

COLOURS = {"ours": "#0b6e99", "stock": "#c8553d"}
LABELS = {"ours": "ours", "stock": "stock, its best"}
MARKERS = {"ours": "o", "stock": "s"}


def draw(results: dict[str, Any], file: Path) -> None:
    """Draw six panels: prefill above, decoding below, along experts, prompt tokens and hidden size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 3, figsize=(11, 6), sharex="col", layout="constrained")
    bandwidth = max(results["bandwidth"]["sum"], results["bandwidth"]["mv"])
    for column, (line, title) in enumerate(GROWTH.items()):
        points = results["growth"][line]
        at = [point["value"] for point in points]
        above, below = panels[0][column], panels[1][column]
        for who, colour in COLOURS.items():
            style = {"color": colour, "marker": MARKERS[who], "label": LABELS[who], "linewidth": 2}
            above.plot(at, [point["tokens"] / point["prefill"][who] for point in points], **style)
            below.plot(at, [point["decode"][who] * 1000 for point in points], **style)
        limit = [point["bytes"] / bandwidth * 1000 for point in points]
        below.plot(at, limit, color="#666666", linestyle=":", label="reading the bytes alone")
        below.set_xlabel(title)
        if line == "prompt":
            below.set_xscale("log", base=2)
        below.set_xticks(at, [str(value) for value in at])
        below.minorticks_off()
        for panel in (above, below):
            panel.set_ylim(bottom=0)
            panel.grid(color="#dddddd", linewidth=0.6)
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
    panels[0][0].set_ylabel("prefill, tokens per second\n(more is better)")
    panels[1][0].set_ylabel("decoding, ms per token\n(less is better)")
    handles, labels = panels[1][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
