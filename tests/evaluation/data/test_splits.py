import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.splits import Shelf, size_in_bytes, without_copies

LONG = " ".join(f"word{i}" for i in range(60))


def test_copies_are_dropped_and_the_first_stays():
    assert without_copies(["short one", LONG, "short one", LONG.replace(" ", "\n")]) == ["short one", LONG]


def test_near_copies_are_dropped():
    changed_in_one_place = LONG.replace("word30 ", "another ")

    assert without_copies([LONG, changed_in_one_place]) == [LONG]


def test_documents_that_share_some_sentences_stay():
    half_new = " ".join([*LONG.split()[:30], *(f"other{i}" for i in range(40))])

    assert without_copies([LONG, half_new]) == [LONG, half_new]


def test_documents_are_handed_out_once():
    texts = [f"document {i} " * (i + 1) for i in range(40)]
    shelf = Shelf.shuffled("numbers", texts, seed=0)

    first, second = shelf.take(2000), shelf.take(3000)

    # All but the last of each, which is cut, are whole.
    assert set(first[:-1]) | set(second[:-1]) <= set(texts)
    assert len(set(first) | set(second)) == len(first) + len(second)
    assert not [text for text in first for other in second if text in other and len(text) > 200]


@pytest.mark.parametrize("budget", [1, 999, 1000, 1001])
def test_budget_is_met_exactly(budget):
    shelf = Shelf("letters", ["a" * 500, "b" * 500, "c" * 500])

    assert size_in_bytes(shelf.take(budget)) == budget


def test_rest_of_a_cut_document_goes_to_nobody():
    shelf = Shelf("letters", ["a" * 500, "b" * 500])

    assert shelf.take(300) == ["a" * 300]
    assert shelf.take(500) == ["b" * 500]


def test_character_is_never_cut_in_two():
    assert Shelf("umlauts", ["ääää"]).take(5) == ["ää"]


def test_order_depends_on_the_seed_alone():
    texts = [str(i) for i in range(100)]
    shelves = [Shelf.shuffled("numbers", texts, seed=seed) for seed in (1, 1, 2)]

    assert shelves[0].texts == shelves[1].texts != shelves[2].texts
    assert sorted(shelves[2].texts) == sorted(texts)


def test_source_too_small_for_its_budget_is_refused():
    shelf = Shelf("letters", ["a" * 500])

    with pytest.raises(ConfigurationError, match="'letters' has 500 bytes left where 501 are wanted"):
        shelf.take(501)
    assert shelf.texts == ["a" * 500]
