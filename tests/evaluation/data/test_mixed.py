import itertools

import pytest

from flexolmo_hf.evaluation.data.mixed import CODE_WITH_PROSE, FORMULAS, PAIRS, mixed_documents
from tests.evaluation.data.handmade import corpus_of

DOMAINS = ("public", "code", "academic")
COMMENTED = '"""A module.\n\n' + "It explains itself at some length.\n" * 9 + '"""\n' + "x = compute(1)\n" * 15
BARE = "x = compute(1)\n" * 40
PAPER = "This is prose without any marks. " * 20
FORMAL = "Let INLINEFORM0 be $x$ in DISPLAYFORM12 . " * 20


def prose(word, sentences=40):
    return " ".join(f"The {word} number {n} is a {word} of a certain kind." for n in range(sentences))


@pytest.fixture
def corpus(tmp_path):
    texts = {domain: [prose(f"{domain}{n}") for n in range(8)] for domain in DOMAINS}
    texts["code"] += [COMMENTED, BARE]
    texts["academic"] += [PAPER, FORMAL]
    return corpus_of(tmp_path / "corpus", texts)


def test_pairs_alternate_between_one_document_of_each_of_two_domains(corpus):
    texts = mixed_documents(corpus)[PAIRS]

    met = set()
    for text in texts:
        segments = text.split("\n\n")
        owners = [next((d for d in DOMAINS if f"The {d}" in segment), "other") for segment in segments]
        if "other" in owners:
            continue
        assert owners[0] != owners[1] and owners == (owners[:2] * len(owners))[: len(owners)] and len(owners) >= 4
        met.add(frozenset(owners))
    assert {frozenset(pair) for pair in itertools.combinations(DOMAINS, 2)} <= met


def test_segments_are_whole_sentences_in_their_order(corpus):
    texts = [text for text in mixed_documents(corpus)[PAIRS] if "The public" in text]

    for text in texts:
        segments = [segment for segment in text.split("\n\n") if segment.startswith("The public")]
        assert all(segment.rstrip().endswith("kind.") and len(segment) >= 200 for segment in segments)
        word = segments[0].split()[1]
        assert prose(word).startswith("".join(segments).rstrip())


def test_no_document_is_used_twice_by_a_pair(corpus):
    texts = mixed_documents(corpus)[PAIRS]
    of_pair = [text.split()[1] for text in texts if "The public" in text and "The academic" in text]

    assert len(set(of_pair)) == len(of_pair) > 4


def test_modules_are_chosen_by_their_share_of_prose(corpus):
    assert mixed_documents(corpus)[CODE_WITH_PROSE] == [COMMENTED]


def test_passages_are_chosen_by_their_formulas(corpus):
    assert mixed_documents(corpus)[FORMULAS] == [FORMAL]


def test_budget_bounds_every_kind_and_is_shared_equally_among_pairs(corpus):
    found = mixed_documents(corpus, budget=9_000)

    assert all(sum(len(text.encode()) for text in texts) <= 9_000 for texts in found.values())
    of_pair = [sum(len(t) for t in found[PAIRS] if f"The {d}" in t) for d in DOMAINS]
    assert min(of_pair) > 0


def test_same_seed_gives_the_same_documents_and_another_gives_others(corpus):
    assert mixed_documents(corpus) == mixed_documents(corpus)
    assert mixed_documents(corpus)[PAIRS] != mixed_documents(corpus, seed=1)[PAIRS]


def test_only_the_named_split_is_read(corpus):
    (corpus.folder / "public" / "train.jsonl").unlink()
    before = mixed_documents(corpus)
    (corpus.folder / "public" / "test.jsonl").write_text("")

    assert mixed_documents(corpus)[PAIRS] != before[PAIRS]


def test_another_split_is_read_alone(corpus):
    expected = mixed_documents(corpus)
    for domain in DOMAINS:
        (corpus.folder / domain / "test.jsonl").unlink()

    assert mixed_documents(corpus, "train") == expected


def test_kinds_without_their_domain_are_left_out(tmp_path):
    assert mixed_documents(corpus_of(tmp_path / "one", {"math": [prose("math")]})) == {}
