"""The opt-out matrix as a heat map."""

import os
from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.figures import DIVERGING, figure, save
from flexolmo_hf.evaluation.optout.matrix import ALL, OptOutMatrix

_CELL = 0.75, 0.42
_MARGIN = 2.6, 1.8
# Title and legend are to fit beside one column too.
_LEAST_WIDTH = 6.0
_LEGEND = (
    "data, and bits per byte with all experts\n"
    "framed: data named after an expert that is left out\n"
    "in parentheses: the 95 % interval holds 0"
)


def draw(matrix: OptOutMatrix, path: str | os.PathLike) -> Path:
    """Draw how each set changes each data set: rows leave something out, columns are data, own cells are framed.

    The colours lie around 0 %; numbers whose interval holds 0 are in parentheses.

    Args:
        matrix: The measurement.
        path: Where to write; PNG, or PDF or SVG by the name's ending.

    Returns:
        The file.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    labels = [label for label in matrix.sets if label != ALL]
    changes = [[matrix.change(label, data) for data in matrix.data] for label in labels]
    percent = [[change.value * 100 for change in row] for row in changes]
    # The same distance to both sides, so that no change has the middle's colour.
    most = max((abs(value) for row in percent for value in row if value == value), default=0.0) or 1.0
    width = max(_LEAST_WIDTH, _MARGIN[0] + _CELL[0] * len(matrix.data))
    height = _MARGIN[1] + _CELL[1] * len(labels)
    with figure(width, height) as (drawn, axes):
        image = axes.imshow(percent, cmap=DIVERGING, vmin=-most, vmax=most, aspect="auto")
        for row, label in enumerate(labels):
            for column, data in enumerate(matrix.data):
                change = changes[row][column]
                shown = f"{change.value * 100:+.1f}" if change.is_clear else f"({change.value * 100:+.1f})"
                axes.text(column, row, shown, ha="center", va="center", color=_ink(image, percent[row][column]))
                if matrix.is_own(label, data):
                    _frame(axes, row, column)
        columns = [f"{data}\n{matrix.bits(ALL, data):.3f}" for data in matrix.data]
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel(_LEGEND)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title("Change of bits per byte, in percent: above 0 is worse")
        drawn.colorbar(image, ax=axes, shrink=0.9, pad=0.02).outline.set_visible(False)
        return save(drawn, Path(path))


def _ink(image: Any, value: float) -> str:
    """Choose black or white, whichever stands out from a cell's colour more."""
    red, green, blue, _ = image.cmap(image.norm(value))
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.4 else "white"


def _frame(axes: Any, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    # White inside black: seen on light cells and on dark ones.
    for colour, width, inset in (("black", 1.6, 0.03), ("white", 1.0, 0.06)):
        corner = column - 0.5 + inset, row - 0.5 + inset
        side = 1 - 2 * inset
        axes.add_patch(Rectangle(corner, side, side, fill=False, edgecolor=colour, linewidth=width))
