"""The house style of figures: readable in print and by the colour-blind, drawn without a screen."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError

#: Okabe and Ito's palette (Color Universal Design, 2008), whose colours differ for every kind of colour vision. Black
#: comes last: text and axes have it already.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#F0E442", "#000000")
#: Hatches in the order of the colours, for figures that are printed in grey.
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SEQUENTIAL = "cividis"
DIVERGING = "PuOr_r"

#: What matplotlib would write into a file of each kind beside the figure.
_UNSAID = {"png": ("Software",), "pdf": ("Creator", "Producer", "CreationDate"), "svg": ("Creator", "Date")}

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 150,
}


@contextmanager
def figure(width: float, height: float, **grid: Any) -> Iterator[tuple[Any, Any]]:
    """Draw a figure in the house style, and forget it afterwards.

    Args:
        width: Inches.
        height: Inches.
        **grid: For matplotlib's ``Figure.subplots``: ``nrows``, ``ncols``, ``sharex`` and so on.

    Yields:
        matplotlib's figure and its axes.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require("eval", "matplotlib")
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # A figure of its own and no pyplot: nothing global is left behind, and no screen is asked for.
    with matplotlib.rc_context(_STYLE):
        drawn = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(drawn)
        yield drawn, drawn.subplots(**grid)


def save(drawn: Any, path: str | Path) -> Path:
    """Write a figure as PNG, PDF or SVG, by the name's ending, with no date and no program in its metadata.

    Raises:
        ConfigurationError: If the name ends otherwise.
    """
    path = Path(path)
    kind = path.suffix.removeprefix(".").lower()
    if kind not in _UNSAID:
        raise ConfigurationError(
            f"{path.name!r} is no name of a figure.", f"Let it end in {', '.join(f'.{known}' for known in _UNSAID)}."
        )
    drawn.savefig(path, metadata=dict.fromkeys(_UNSAID[kind]))
    return path
