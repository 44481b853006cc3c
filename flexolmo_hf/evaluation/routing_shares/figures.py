"""Figures of routing shares, readable in print and by the colour-blind: numbers, hatches and markers beside colours.

Shape letters: D domains, L layers, E experts, P buckets of positions.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_hf.evaluation.figures import COLOURS, HATCHES, MARKERS, SEQUENTIAL, figure, save
from flexolmo_hf.evaluation.routing_shares.result import Kind, RoutingShares

#: What a kind of share is called on an axis.
NAMES: dict[Kind, str] = {
    "weight": "share of the routing weight",
    "top1": "share of tokens whose strongest expert it is",
    "picks": "share of the places among the strongest",
}


def draw_shares(shares: RoutingShares, folder: str | Path, kind: Kind = "weight") -> list[Path]:
    """Draw all figures into a folder as PNG files.

    Args:
        shares: What was measured.
        folder: Where to; has to exist.
        kind: Which share. The figure over positions shows routing weights whatever it is.

    Returns:
        The files: heat maps, bars, lines over depth and lines over position.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    place = Path(folder)
    return [
        heat_maps(shares, place / "heat_maps.png", kind),
        domain_bars(shares, place / "domains.png", kind),
        depth_lines(shares, place / "depth.png", kind),
        position_lines(shares, place / "position.png"),
    ]


def heat_maps(shares: RoutingShares, path: str | Path, kind: Kind = "weight") -> Path:
    """Draw domains by experts for the first, middle and last layer and for all; a frame marks the own expert."""
    shown = _chosen_layers(shares.layers)
    rows, columns = len(shares.domains), len(shares.experts)
    highest = max(float(shares.array(kind, layer).max()) for _, layer in shown)
    width, height = 1.3 + 0.52 * columns, 1.0 + 0.34 * rows
    across = min(2, len(shown))
    down = math.ceil(len(shown) / across)
    with figure(max(across * width, 6), down * max(height, 2) + 0.2, nrows=down, ncols=across, squeeze=False) as (
        drawn,
        axes,
    ):
        for axis in axes.flat[len(shown) :]:
            axis.set_axis_off()
        for axis, (title, layer) in zip(axes.flat, shown, strict=False):
            shares_DE = shares.array(kind, layer)
            image = axis.imshow(shares_DE, cmap=SEQUENTIAL, vmin=0, vmax=highest, aspect="auto")
            axis.set_title(title)
            axis.set_xticks(range(columns), shares.experts, rotation=45, ha="right", rotation_mode="anchor")
            axis.set_yticks(range(rows), shares.domains)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
            _write_cells(axis, shares_DE, highest)
            _frame_own(axis, shares)
        drawn.supxlabel("expert", fontsize=9)
        drawn.supylabel("domain", fontsize=9)
        bar = drawn.colorbar(image, ax=axes, label=NAMES[kind], fraction=0.04)
        bar.ax.yaxis.set_major_formatter(_percent)
        return save(drawn, path)


def domain_bars(shares: RoutingShares, path: str | Path, kind: Kind = "weight") -> Path:
    """Draw each domain as a bar made of the experts' shares over all layers."""
    shares_DE = shares.array(kind)
    with figure(7, 1.3 + 0.42 * len(shares.domains)) as (drawn, axis):
        left_D = np.zeros(len(shares.domains))
        for column, expert in enumerate(shares.experts):
            colour, _, hatch = _cues(column)
            axis.barh(
                shares.domains,
                shares_DE[:, column],
                left=left_D,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.8,
                height=0.75,
                label=expert,
            )
            for row, share in enumerate(shares_DE[:, column]):
                if share >= 0.06:
                    own = shares.domains[row] == expert
                    axis.text(
                        left_D[row] + share / 2,
                        row,
                        f"{share:.0%}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        weight="bold" if own else "normal",
                        bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"},
                    )
            left_D += shares_DE[:, column]
        axis.invert_yaxis()
        axis.set_xlim(0, 1)
        axis.xaxis.set_major_formatter(_percent)
        axis.set_xlabel(f"{NAMES[kind]}, all layers")
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        drawn.legend(loc="outside upper left", ncols=min(len(shares.experts), 8), handlelength=1.5, columnspacing=1.2)
        return save(drawn, path)


def depth_lines(shares: RoutingShares, path: str | Path, kind: Kind = "weight") -> Path:
    """Draw the experts' shares over the layers, a panel for each domain."""
    shares_DLE = getattr(shares, kind)
    layers = np.arange(shares.layers)
    return _panels(shares, path, shares_DLE, [layers] * len(shares.domains), f"layer\n{NAMES[kind]}")


def position_lines(shares: RoutingShares, path: str | Path) -> Path:
    """Draw the experts' shares of the routing weight over positions, all layers, a panel for each domain."""
    middles = np.array([math.sqrt(low * high) for low, high in shares.buckets])
    reached = [tokens_P > 0 for tokens_P in shares.bucket_tokens]
    lines = [shares.position[row].mean(axis=1)[reached[row]] for row in range(len(shares.domains))]
    return _panels(
        shares, path, lines, [middles[seen] for seen in reached], f"token of the window\n{NAMES['weight']}", log=True
    )


def _panels(
    shares: RoutingShares, path: str | Path, lines: Any, places: Any, labels: str, *, log: bool = False
) -> Path:
    """Draw a panel for each domain: lines ``(places, E)`` over places; labels are those of both axes."""
    count = len(shares.domains)
    across = min(4, count)
    down = math.ceil(count / across)
    highest = max(float(np.max(line)) for line in lines)
    sizes = {"nrows": down, "ncols": across, "sharex": True, "sharey": True, "squeeze": False}
    with figure(max(2.2 * across + 0.6, 6), 1.9 * down + 1.0, **sizes) as (drawn, axes):
        for axis in axes.flat[count:]:
            axis.set_axis_off()
        for row, (axis, domain) in enumerate(zip(axes.flat, shares.domains, strict=False)):
            for column, expert in enumerate(shares.experts):
                colour, marker, _ = _cues(column)
                own = expert == domain
                axis.plot(
                    places[row],
                    lines[row][:, column],
                    color=colour,
                    marker=marker,
                    markevery=max(1, len(places[row]) // 8),
                    markersize=5 if own else 3.5,
                    # Yellow on white is seen by its edge.
                    markeredgecolor="0.2",
                    markeredgewidth=0.4,
                    linewidth=2.6 if own else 1.2,
                    zorder=3 if own else 2,
                    label=expert if row == 0 else None,
                )
            axis.set_title(domain)
            axis.set_ylim(0, min(1.02, highest * 1.08))
            axis.yaxis.set_major_formatter(_percent)
            axis.grid(axis="y", color="0.9", linewidth=0.6)
        _x_axis(axes.flat[0], log=log, layers=shares.layers)
        for axis in axes.flat[max(0, count - across) : count]:
            # Those of a row above a gap would otherwise have no numbers.
            axis.tick_params(labelbottom=True)
        below, beside = labels.split("\n")
        drawn.supxlabel(below, fontsize=9)
        drawn.supylabel(beside, fontsize=9)
        legend = drawn.legend(loc="outside upper left", ncols=min(len(shares.experts), 8), columnspacing=1.2)
        for line in legend.get_lines():
            line.set_linewidth(1.2)
        return save(drawn, path)


def _x_axis(axis: Any, *, log: bool, layers: int) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if log:
        axis.set_xscale("log", base=4)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda place, _: f"{place:.0f}"))
        axis.minorticks_off()
    else:
        axis.xaxis.set_major_locator(MaxNLocator(nbins=min(layers, 6), integer=True))


def _chosen_layers(layers: int) -> list[tuple[str, int | None]]:
    # With few layers, the first, middle and last are not three.
    numbers = sorted({0, layers // 2, layers - 1})
    return [*((f"layer {number}", number) for number in numbers), ("all layers", None)]


def _cues(column: int) -> tuple[str, str, str]:
    """Give an expert its colour, marker and hatch; with more experts than colours, the pairs still differ."""
    round_, place = divmod(column, len(COLOURS))
    shift = (place + round_) % len(MARKERS)
    return COLOURS[place], MARKERS[shift], HATCHES[shift]


def _write_cells(axis: Any, shares_DE: np.ndarray, highest: float) -> None:
    if shares_DE.shape[1] > 12:
        return
    for (row, column), share in np.ndenumerate(shares_DE):
        colour = "black" if share > 0.45 * highest else "white"
        axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour, fontsize=8)


def _frame_own(axis: Any, shares: RoutingShares) -> None:
    from matplotlib.patches import Rectangle

    for column, expert in enumerate(shares.experts):
        if expert in shares.domains:
            row = shares.domains.index(expert)
            axis.add_patch(
                Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, fill=False, edgecolor=COLOURS[3], linewidth=2)
            )


def _percent(share: float, _: Any) -> str:
    return f"{share:.0%}"
