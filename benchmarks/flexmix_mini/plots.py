"""The study's figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flexmix_mini.claims import by_experts, opt_out_of, routing_of
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.tables import Row
from flexolmo_hf.evaluation.figures import COLOURS, MARKERS, SEQUENTIAL, figure, save
from flexolmo_hf.evaluation.optout.figure import draw


def draw_all(place: Place, folder: Path, table_1: Sequence[Row], table_2: Sequence[Row]) -> None:
    """Draw every figure of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    _methods(folder / "methods.png", table_1, table_2)
    draw(opt_out_of(place), folder / "optout.png")
    _routing(folder / "routing.png", routing_of(place))
    _experts(folder / "experts.png", by_experts(place))


def _methods(path: Path, table_1: Sequence[Row], table_2: Sequence[Row]) -> None:
    with figure(9, 5.2, ncols=2) as (drawn, axes):
        for axis, rows, title in zip(axes, (table_1, table_2), ("Four experts", "All experts"), strict=True):
            rows = [row for row in rows if not row.label.startswith("dense ")][::-1]
            at = np.arange(len(rows))
            # Points, since bars would have to begin at zero, where no model is.
            for column, label, index in (("domains", "single domains", 0), ("mixed", "mixed documents", 1)):
                axis.errorbar(
                    [row.values.get(column, np.nan) for row in rows],
                    at,
                    xerr=[row.deviation.get(column, 0) for row in rows],
                    color=COLOURS[index],
                    marker=MARKERS[index],
                    linestyle="none",
                    label=label,
                )
            axis.set_yticks(at, [row.label for row in rows])
            axis.grid(axis="y", alpha=0.4)
            axis.set_xlabel("held-out bits per byte (lower is better)")
            axis.set_title(title)
        axes[0].legend(loc="lower left", bbox_to_anchor=(0, 1.06), ncols=2)
        save(drawn, path)


def _routing(path: Path, found: dict[str, Any]) -> None:
    percent = 100 * np.array(found["weight"])
    layers = percent.shape[1]
    with figure(8, 3.4 * ((layers + 1) // 2), nrows=(layers + 1) // 2, ncols=2, sharey=True) as (drawn, axes):
        for axis in axes.flat[layers:]:
            axis.set_axis_off()
        for layer, axis in enumerate(axes.flat[:layers]):
            shown = axis.imshow(percent[:, layer], cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto")
            for (row, column), share in np.ndenumerate(percent[:, layer]):
                colour = "white" if share < 50 else "black"
                axis.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=7)
            axis.set_xticks(range(len(found["experts"])), found["experts"], rotation=60, ha="right")
            axis.set_yticks(range(len(found["domains"])), found["domains"])
            axis.spines[:].set_visible(False)
            axis.set_title(f"layer {layer + 1}")
        drawn.colorbar(shown, ax=axes, label="share of routing weight, %")
        save(drawn, path)


def _experts(path: Path, table: Sequence[tuple[int, float]]) -> None:
    with figure(4.5, 3) as (drawn, axis):
        axis.plot([used for used, _ in table], [value for _, value in table], color=COLOURS[0], marker=MARKERS[0])
        axis.set_xlabel("experts per token")
        axis.set_ylabel("mean bits per byte")
        axis.set_title("With router tuning")
        save(drawn, path)
