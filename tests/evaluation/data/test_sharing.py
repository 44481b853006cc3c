import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.sharing import Sharer
from flexolmo_hf.evaluation.data.tokens import QuarterOfBytes

BUDGETS = {"test": 100, "validation": 50, "train": 400}


def document(number, pieces=1, words=30):
    return [" ".join(f"d{number}p{piece}w{word}" for word in range(words)) for piece in range(pieces)]


def sharer(seed=0, contaminated=lambda texts: (list(texts), [])):
    return Sharer(QuarterOfBytes(), contaminated, seed)


def owner_of(text):
    return text.split("p")[0]


def test_every_split_has_exactly_its_budget():
    sharing = sharer().share("x", [document(n) for n in range(60)], BUDGETS)

    assert sharing.tokens == BUDGETS
    assert {split: sum(QuarterOfBytes().count(texts)) for split, texts in sharing.splits.items()} == BUDGETS


def test_pieces_behind_the_one_that_is_cut_go_to_nobody():
    # A piece has 23 or 24 tokens: the budget ends within the second.
    sharing = sharer().share("x", [document(1, pieces=4, words=12)], {"test": 30})

    assert sharing.tokens == {"test": 30}
    assert len(sharing.splits["test"]) == 2


def test_pieces_of_a_document_are_in_one_split_only():
    sharing = sharer().share("x", [document(n, pieces=3) for n in range(30)], BUDGETS)

    owners = [{owner_of(text) for text in texts} for texts in sharing.splits.values()]
    assert not set.intersection(owners[0], owners[1] | owners[2]) and not owners[1] & owners[2]
    assert sharing.unused == 30 - len(set.union(*owners)) > 0


def test_split_does_not_depend_on_the_budgets_of_later_ones():
    documents = [document(n) for n in range(60)]

    one = sharer().share("x", documents, BUDGETS)
    other = sharer().share("x", documents, BUDGETS | {"train": 200})

    assert one.splits["test"] == other.splits["test"] and one.splits["validation"] == other.splits["validation"]


def test_copies_of_an_earlier_domain_are_dropped_and_counted():
    same = sharer()
    first = same.share("x", [document(n) for n in range(12)], {"train": 500})
    second = same.share("y", [document(n) for n in range(24)], {"train": 500})

    assert second.copies > 0
    whole = {text for text in first.splits["train"] if text.endswith("w29")}
    assert not whole & set(second.splits["train"])


def test_contaminated_pieces_are_dropped_and_named():
    def contaminated(texts):
        return [text for text in texts if "d7p" not in text], ["hash" for text in texts if "d7p" in text]

    sharing = sharer(contaminated=contaminated).share("x", [document(n) for n in range(12)], {"train": 600})

    assert (sharing.contaminated, sharing.copies) == (["hash"], 0)
    assert not [text for text in sharing.splits["train"] if "d7p" in text]


def test_order_depends_on_the_seed():
    documents = [document(n) for n in range(60)]
    runs = [sharer(seed).share("x", documents, BUDGETS).splits for seed in (0, 0, 1)]

    assert runs[0] == runs[1] != runs[2]


def test_domain_that_is_too_small_is_refused_with_what_it_has():
    with pytest.raises(ConfigurationError, match="'x' has .* tokens left for its split 'train' where 400"):
        sharer().share("x", [document(n) for n in range(5)], BUDGETS)


def test_empty_split_is_refused():
    with pytest.raises(ConfigurationError, match="'validation'"):
        sharer().share("x", [document(0)], {"test": 20, "validation": 1})
