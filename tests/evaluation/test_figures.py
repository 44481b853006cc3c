"""Figures say nothing beside what they show, and leave nothing behind."""

import struct

import pytest

from flexolmo_hf.errors import ConfigurationError, MissingExtraError
from flexolmo_hf.evaluation.figures import COLOURS, DIVERGING, HATCHES, MARKERS, SEQUENTIAL, figure, save

matplotlib = pytest.importorskip("matplotlib")


def drawn(path):
    with figure(3, 2) as (canvas, axes):
        axes.plot([1, 2], [2, 1], color=COLOURS[0])
        return save(canvas, path)


def chunks(png):
    """Name the parts of a PNG file."""
    names, place = [], 8
    while place < len(png):
        (size,) = struct.unpack(">I", png[place : place + 4])
        names.append(png[place + 4 : place + 8].decode("ascii"))
        place += size + 12
    return names


@pytest.mark.parametrize("name", ["figure.png", "figure.PNG"])
def test_a_png_holds_its_size_and_its_pixels_and_no_more(tmp_path, name):
    file = drawn(tmp_path / name)

    assert file == tmp_path / name
    assert set(chunks(file.read_bytes())) == {"IHDR", "pHYs", "IDAT", "IEND"}


@pytest.mark.parametrize("name", ["figure.pdf", "figure.svg"])
def test_other_files_name_neither_date_nor_program(tmp_path, name):
    said = drawn(tmp_path / name).read_bytes().lower()

    for word in ("creationdate", "/creator", "/producer", "dc:date", "dc:creator", "matplotlib v", "matplotlib.org"):
        assert word.encode() not in said, word


def test_the_same_figure_is_the_same_file(tmp_path):
    one, two = (drawn(tmp_path / name).read_bytes() for name in ("one.png", "two.png"))

    assert one == two


@pytest.mark.parametrize("name", ["figure.jpg", "figure"])
def test_a_name_of_another_kind_is_refused(tmp_path, refused, name):
    with refused(ConfigurationError, repr(name), ".png, .pdf, .svg"):
        drawn(tmp_path / name)


def test_the_style_is_the_figures_own_and_no_screen_is_asked_for():
    before = dict(matplotlib.rcParams)
    with figure(3, 2, nrows=2) as (canvas, axes):
        assert len(axes) == 2
        assert not axes[0].spines["top"].get_visible()
        assert tuple(canvas.get_size_inches()) == (3, 2)
        assert type(canvas.canvas).__name__ == "FigureCanvasAgg"

    assert dict(matplotlib.rcParams) == before


def test_each_colour_has_a_hatch_and_a_marker_and_the_maps_exist():
    assert len(set(COLOURS)) == len(set(HATCHES)) == len(set(MARKERS)) == 8
    assert {SEQUENTIAL, DIVERGING} <= set(matplotlib.colormaps)


def test_the_middle_of_the_diverging_map_is_light_and_its_ends_differ():
    low, middle, high = (matplotlib.colormaps[DIVERGING](place) for place in (0.0, 0.5, 1.0))

    assert min(middle[:3]) > 0.9
    # Purple and orange: one has more blue than red, the other less.
    assert low[2] > low[0] and high[2] < high[0]


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("flexolmo_hf._extras.find_spec", lambda name: None)

    with pytest.raises(MissingExtraError, match="eval"), figure(3, 2):
        pass
