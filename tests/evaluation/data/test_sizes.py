import pytest

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
