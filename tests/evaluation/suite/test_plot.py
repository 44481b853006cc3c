"""The figure: a bar is as long as the number in the table, in the unit that its axis names."""

import pytest

from flexolmo_hf.evaluation.suite import plot
from tests.evaluation.suite.test_results import of_sets, task

pytest.importorskip("matplotlib")


@pytest.fixture
def draw(monkeypatch):
    """Draw results and return the panels instead of a file."""
    drawn = []
    monkeypatch.setattr(plot, "save", lambda figure, path: drawn.extend(figure.axes))

    def panels(**sets):
        plot.plot_results(of_sets(**sets), "figure.png")
        return drawn

    return panels


def lengths(panel):
    return [bar.get_width() for bar in panel.patches]


def test_shares_are_drawn_out_of_100_and_bits_per_byte_as_they_are(draw):
    shares = [task("boolq", 0.5, "rc"), task("gsm8k", 0.2, "rc"), task("math", 0.4, "rc")]
    of_shares, of_bits = draw(public=[*shares, task("boolq", 1.25, "bpb", "bits_per_byte")])

    assert [label.get_text() for label in of_shares.get_yticklabels()] == ["mc9 (1 of 9)", "math2", "average"]
    assert lengths(of_shares) == pytest.approx([50, 30, 40])
    assert lengths(of_bits) == [1.25]
    assert "out of 100" in of_shares.get_xlabel()
    assert "bits per byte" in of_bits.get_xlabel()


def test_each_set_has_its_own_bars_and_what_failed_is_called_none(draw):
    (panel,) = draw(public=[task("gsm8k", 0.2), task("math", None)], math=[task("gsm8k", 0.4), task("math", 0.8)])

    assert lengths(panel) == pytest.approx([20, 0, 40, 80])
    assert [text.get_text() for text in panel.texts] == ["20.0", "none", "40.0", "80.0"]
