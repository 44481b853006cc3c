import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.recipe.repetition import SeenTexts


def test_a_text_is_new_once():
    seen = SeenTexts(100, 1e-6)

    assert [seen.add(f"text {number}") for number in range(100)] == [True] * 100
    assert [seen.add(f"text {number}") for number in range(100)] == [False] * 100


def test_case_and_white_space_make_no_new_text():
    seen = SeenTexts(10, 1e-6)
    seen.add("One  text.")

    assert not seen.add(" one\ntext. ")


def test_a_full_memory_takes_few_new_texts_for_known():
    seen = SeenTexts(5_000, 0.01)

    known = sum(not seen.add(f"text {number}") for number in range(5_000))

    # The share grows up to 1% while it fills.
    assert known < 50


def test_the_memory_is_as_large_as_documented():
    assert SeenTexts(1_000_000, 1e-4).size_in_bytes == pytest.approx(2.4e6, rel=0.01)


def test_more_texts_than_there_is_room_for_are_refused():
    seen = SeenTexts(3, 1e-9)
    for number in range(3):
        seen.add(f"text {number}")

    assert not seen.add("text 1")
    with pytest.raises(ConfigurationError, match="more documents than"):
        seen.add("text 3")
