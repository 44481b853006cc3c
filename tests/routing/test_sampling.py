"""The sample is uniform and repeatable, and its size is all that is ever in memory."""

import weakref
from collections import Counter

import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.routing.sampling import sample_texts


def test_few_texts_are_all_taken_in_their_order():
    assert sample_texts(iter(["a", "b", "c"]), sample=5, seed=0) == (["a", "b", "c"], 0)


def test_texts_without_a_visible_character_are_counted_and_take_no_place():
    assert sample_texts(["", " \n", "a", "\t", "b"], sample=2, seed=0) == (["a", "b"], 3)


def test_the_same_seed_draws_the_same_sample_and_another_seed_another():
    texts = [str(number) for number in range(1000)]
    first, _ = sample_texts(texts, sample=20, seed=1)

    assert sample_texts(texts, sample=20, seed=1)[0] == first
    assert sample_texts(texts, sample=20, seed=2)[0] != first
    assert len(set(first)) == 20


def test_every_text_has_the_same_chance():
    texts = [str(number) for number in range(10)]
    drawn = Counter(text for seed in range(2000) for text in sample_texts(texts, sample=3, seed=seed)[0])

    assert set(drawn) == set(texts)
    # 600 expected of each; the standard deviation is 20.
    assert all(500 < count < 700 for count in drawn.values())


def test_no_more_texts_than_the_sample_are_held():
    class Text(str):
        pass

    alive = weakref.WeakSet()
    most = 0

    def stream():
        nonlocal most
        for number in range(500):
            text = Text(number)
            alive.add(text)
            most = max(most, len(alive))
            yield text

    sample_texts(stream(), sample=10, seed=0)

    # One more is on its way, and one held by the stream.
    assert most <= 12


@pytest.mark.parametrize("texts", ["one text", b"one text", ["a", 1], [None]], ids=repr)
def test_what_is_no_row_of_texts_is_refused_without_showing_it(texts):
    with pytest.raises(ConfigurationError) as caught:
        sample_texts(texts, sample=5, seed=0)
    assert "one text" not in str(caught.value)


def test_a_sample_of_none_is_refused():
    with pytest.raises(ConfigurationError, match="sample is 0"):
        sample_texts(["a"], sample=0, seed=0)
