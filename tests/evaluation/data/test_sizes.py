from itertools import pairwise

import pytest

from flexolmo_hf.evaluation.data import sizes as module
from flexolmo_hf.evaluation.data.sizes import draw_sizes, split_sizes
from tests.evaluation.data.handmade import corpus_of


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "corpus", {"public": ["One text."], "math": ["1 + 1 = 2", "two"]})


def test_sizes_are_those_of_the_record_from_train_to_test(corpus):
    sizes = split_sizes(corpus)

    assert [(size.domain, size.split, size.documents) for size in sizes] == [
        ("public", "train", 1),
        ("public", "test", 1),
        ("math", "train", 2),
        ("math", "test", 2),
    ]
    assert sizes[0].bytes == 9 and sizes[0].tokens == 2


def test_figure_is_a_picture_that_names_nothing_of_the_machine(corpus, tmp_path):
    first, second = (draw_sizes(corpus, tmp_path / name).read_bytes() for name in ("a.png", "b.png"))

    assert first.startswith(b"\x89PNG") and first == second
    assert str(tmp_path).encode() not in first


def test_bars_are_as_long_as_their_splits_and_stand_end_to_end(corpus, tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(module, "save", lambda drawn, path: kept.append(drawn))
    draw_sizes(corpus, tmp_path / "a.png")
    splits = kept[0].axes[0].containers

    # Train, seen by the public model, validation, test; of public text and of math.
    assert [[bar.get_width() for bar in bars] for bars in splits] == [[2, 3], [0, 0], [0, 0], [2, 3]]
    for before, after in pairwise(splits):
        assert [bar.get_x() for bar in after] == [bar.get_x() + bar.get_width() for bar in before]
