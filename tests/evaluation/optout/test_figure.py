"""The heat map shows every number, frames own data, and keeps its colours apart around 0 %."""

from contextlib import contextmanager

import pytest

from flexolmo_hf.evaluation.optout import figure as module
from flexolmo_hf.evaluation.optout.figure import draw
from tests.evaluation.optout.made import CHANGES, made


@pytest.fixture
def drawn(monkeypatch):
    """Keep the axes of what is drawn."""
    kept, original = [], module.figure

    @contextmanager
    def figure(*sizes, **grid):
        with original(*sizes, **grid) as (drawing, axes):
            kept.append(axes)
            yield drawing, axes

    monkeypatch.setattr(module, "figure", figure)
    return kept


def test_every_cell_shows_its_change_and_rows_are_what_is_left_out(tmp_path, drawn):
    draw(made(), tmp_path / "map.png")
    (axes,) = drawn
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}

    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == list(CHANGES)
    assert [label.get_text().split("\n") for label in axes.get_xticklabels()] == [
        ["public", "2.000"],
        ["math", "2.000"],
        ["code", "2.000"],
    ]
    assert shown == {
        (row, column): f"{percent:+.1f}"
        for row, of_row in enumerate(CHANGES.values())
        for column, percent in enumerate(of_row.values())
    }


def test_a_change_that_may_be_none_is_in_parentheses(tmp_path, drawn):
    draw(made(spread=2), tmp_path / "map.png")

    assert {text.get_text() for text in drawn[0].texts} >= {"(+0.4)", "(-0.2)", "+12.0"}


def test_a_change_that_is_not_a_number_is_in_parentheses_too(tmp_path, drawn):
    draw(made({**CHANGES, "without math": {"public": 0.1, "math": float("nan"), "code": 1}}), tmp_path / "map.png")

    assert "(+nan)" in {text.get_text() for text in drawn[0].texts}


def test_title_and_legend_fit_beside_one_column(tmp_path, drawn):
    draw(made({label: {"math": 1} for label in made().sets}), tmp_path / "map.png")
    (axes,) = drawn
    renderer = axes.figure.canvas.get_renderer()

    for text in (axes._left_title, axes.xaxis.label):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= axes.figure.bbox.width, text.get_text()


def test_own_data_are_framed(tmp_path, drawn):
    draw(made(), tmp_path / "map.png")

    centres = {(round(patch.get_y() + 0.45), round(patch.get_x() + 0.45)) for patch in drawn[0].patches}
    assert centres == {(0, 0), (1, 1), (2, 2)}


def test_colours_lie_evenly_around_zero(tmp_path, drawn):
    draw(made(), tmp_path / "map.png")

    assert drawn[0].images[0].get_clim() == (pytest.approx(-40), pytest.approx(40))


def test_a_cells_number_stands_out_from_its_colour(tmp_path, drawn):
    draw(made(), tmp_path / "map.png")
    (axes,) = drawn
    image = axes.images[0]
    for text in axes.texts:
        column, row = text.get_position()
        red, green, blue, _ = image.cmap(image.norm(image.get_array()[row][column]))
        light = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        assert abs(light - (text.get_color() == "white")) > 0.35


def test_the_same_matrix_makes_the_same_file(tmp_path):
    one, two = (draw(made(), tmp_path / name).read_bytes() for name in ("one.png", "two.png"))

    assert one == two
    assert one.startswith(b"\x89PNG")
