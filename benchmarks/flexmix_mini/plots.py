"""The study's figures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.flexmix_mini.claims import ALL, by_experts, opt_out_rows, routing_of
from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.tables import Row, Scores, change
from flexolmo_hf.evaluation.figures import COLOURS, DIVERGING, MARKERS, SEQUENTIAL, figure, save


def draw_all(place: Place, folder: Path, table_1: Sequence[Row], table_2: Sequence[Row]) -> None:
    """Draw every figure of the page."""
    folder.mkdir(parents=True, exist_ok=True)
    _methods(folder / "methods.png", table_1, table_2)
    _opt_out(folder / "optout.png", opt_out_rows(place))
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


def _opt_out(path: Path, rows: dict[str, Scores]) -> None:
    labels = [label for label in rows if label != ALL]
    domains = list(rows[ALL].documents)
    table = np.array([[100 * change(rows[label], rows[ALL], name)[0] for name in domains] for label in labels])
    with figure(7.5, 4.8) as (drawn, axis):
        most = np.abs(table).max()
        shown = axis.imshow(table, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
        _write(axis, table, most, "{:+.1f}")
        axis.set_xticks(range(len(domains)), domains, rotation=30, ha="right")
        axis.set_yticks(range(len(labels)), labels)
        axis.spines[:].set_visible(False)
        axis.set_title("Change of bits per byte when an expert is left out, %")
        drawn.colorbar(shown, ax=axis)
        save(drawn, path)


def _routing(path: Path, found: dict[str, Any]) -> None:
    weight = np.array(found["weight"])
    layers = [0, weight.shape[1] // 2, weight.shape[1] - 1]
    with figure(9.5, 3.9, ncols=3, sharey=True) as (drawn, axes):
        for axis, layer in zip(axes, layers, strict=True):
            shown = axis.imshow(100 * weight[:, layer], cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto")
            _write(axis, 100 * weight[:, layer], 100, "{:.0f}", dark_below=0.5)
            axis.set_xticks(range(len(found["experts"])), found["experts"], rotation=60, ha="right")
            axis.set_yticks(range(len(found["domains"])), found["domains"])
            axis.spines[:].set_visible(False)
            axis.set_title(f"layer {layer + 1}")
        drawn.colorbar(shown, ax=axes, label="share of routing weight, %")
        save(drawn, path)


def _write(axis: Any, table: np.ndarray, most: float, text: str, *, dark_below: float | None = None) -> None:
    for (row, column), value in np.ndenumerate(table):
        on_dark = value < dark_below * most if dark_below is not None else abs(value) > 0.6 * most
        colour = "white" if on_dark else "black"
        axis.text(column, row, text.format(value), ha="center", va="center", color=colour, fontsize=7)


def _experts(path: Path, table: Sequence[tuple[int, float]]) -> None:
    with figure(4.5, 3) as (drawn, axis):
        axis.plot([used for used, _ in table], [value for _, value in table], color=COLOURS[0], marker=MARKERS[0])
        axis.set_xlabel("experts per token")
        axis.set_ylabel("mean bits per byte")
        axis.set_title("With router tuning")
        save(drawn, path)
