"""Tables and figures show what was measured, for any number of layers, domains and experts."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from flexolmo_hf.evaluation.routing_shares import RoutingShares, routing_shares
from flexolmo_hf.evaluation.routing_shares import figures as drawn
from flexolmo_hf.evaluation.routing_shares.report import markdown, table, write_report
from flexolmo_hf.evaluation.routing_shares.tally import buckets

TEXTS = {"math": ["mmmc"], "code": ["ccpm", "cccc"]}


def invented(experts, domains, layers, max_length=64):
    weights, top1, picks = np.random.default_rng(0).dirichlet(np.ones(experts), size=(3, domains, layers))
    places = buckets(max_length)
    return RoutingShares(
        experts=[f"e{n}" for n in range(experts)],
        public="e0",
        domains=[f"e{n}" for n in range(domains)],
        documents=[3] * domains,
        tokens=[30] * domains,
        top_k=1,
        max_length=max_length,
        buckets=places,
        weight=weights,
        top1=top1,
        picks=picks,
        entropy=np.ones((domains, layers)),
        agreement=np.ones((domains, layers, layers)),
        bucket_tokens=np.ones((domains, len(places)), dtype=int),
        position=np.stack([weights] * len(places), axis=1),
    )


def test_the_report_is_complete_and_holds_no_text(model, tokenizer, tmp_path):
    found = routing_shares(model, tokenizer, {"math": ["mmmc secret"], "code": ["cc"]})
    files = write_report(found, tmp_path)

    assert sorted(file.name for file in files) == sorted(file.name for file in tmp_path.iterdir())
    page = (tmp_path / "routing_shares.md").read_text("utf8")
    pictures = [file.name for file in files if file.suffix == ".png"]
    assert len(pictures) == 4
    assert [name for name in pictures if f"({name})" not in page] == []
    assert not [file.name for file in files if b"secret" in file.read_bytes()]


def test_markdown_shows_the_shares_of_each_domain(model, tokenizer):
    page = markdown(routing_shares(model, tokenizer, TEXTS))

    assert "| math | 0.0% | 50.0% | 50.0% | 4 |" in page
    assert "| code | 12.5% | 43.8% | 43.8% | 8 |" in page
    assert "| math | +" in page.split("## Specialisation")[1]
    # With all experts picked for all tokens, shares of picks say nothing.
    assert "places among" not in page
    assert "places among the strongest 2" in markdown(routing_shares(model, tokenizer, TEXTS, top_k=2))


def test_markdown_shows_each_layer_and_how_often_it_agrees_with_the_next(model, tokenizer):
    # "p" goes to public in both layers; "m" and "c" change sides.
    page = markdown(routing_shares(model, tokenizer, {"mixed": ["ppmc"]}))
    first, last = page.split("## Layers")[1].splitlines()[-2:]

    assert first.startswith("| 0 | 34.4% | 34.4% |") and first.endswith("| 1.34 | 50.0% (37.5%) |")
    assert last.startswith("| 1 | 34.4% |") and last.endswith("| 34.4% | 1.34 |  |")


def test_the_table_marks_the_largest_share_and_shows_names_as_they_are(model, tokenizer):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table(routing_shares(model, tokenizer, {"[red]x[/red]": ["ppp"]})))
    said = console.export_text()

    assert "[red]x[/red]" in said
    assert "50.0%" in said
    assert "1.50" in said


@pytest.mark.parametrize(
    ("experts", "domains", "layers", "max_length"), [(1, 1, 1, 2), (2, 1, 2, 64), (9, 10, 3, 2), (20, 3, 40, 64)]
)
def test_figures_of_any_size_are_drawn(tmp_path, experts, domains, layers, max_length):
    files = drawn.draw_shares(invented(experts, domains, layers, max_length), tmp_path)

    for file in files:
        assert np.asarray(Image.open(file).convert("L")).std() > 0
    assert markdown(invented(experts, domains, layers))


def test_bars_and_lines_carry_the_shares_measured(tmp_path, monkeypatch):
    shares, kept = invented(3, 2, 4), []
    monkeypatch.setattr(drawn, "save", lambda figure, path: kept.append(figure) or path)
    drawn.draw_shares(shares, tmp_path, kind="top1")
    heat, bars, depth, position = kept

    np.testing.assert_array_equal(heat.axes[0].images[0].get_array(), shares.top1[:, 0])
    np.testing.assert_array_equal(heat.axes[2].images[0].get_array(), shares.top1[:, 3])
    np.testing.assert_array_equal(heat.axes[3].images[0].get_array(), shares.top1.mean(axis=1))
    widths = [bar.get_width() for bar in bars.axes[0].patches]
    np.testing.assert_allclose(widths, shares.top1.mean(axis=1).T.flatten())
    np.testing.assert_array_equal(depth.axes[1].lines[2].get_ydata(), shares.top1[1, :, 2])
    np.testing.assert_allclose(position.axes[1].lines[2].get_ydata(), shares.position[1].mean(axis=1)[:, 2])


def test_lines_over_positions_end_where_the_documents_do(tmp_path, monkeypatch):
    shares, kept = invented(3, 2, 4), []
    shares.bucket_tokens[1, 4:] = 0
    shares.position[1, 4:] = 0
    monkeypatch.setattr(drawn, "save", lambda figure, path: kept.append(figure))
    drawn.position_lines(shares, tmp_path)

    assert [len(axis.lines[0].get_xdata()) for axis in kept[0].axes] == [len(shares.buckets), 4]
    assert min(axis.lines[0].get_ydata().min() for axis in kept[0].axes) > 0


def test_every_expert_has_a_look_of_its_own():
    looks = [drawn._cues(column) for column in range(24)]

    assert len(set(looks)) == 24
    assert len({marker for _, marker, _ in looks[:8]}) == 8
