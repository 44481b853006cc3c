from pathlib import Path

import numpy as np
import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data import separability as module
from flexolmo_hf.evaluation.data.separability import draw_separability, separability
from tests.evaluation.data.handmade import corpus_of

TEXTS = {
    "math": ["the sum of two numbers", "a number and its square", "prime numbers and sums"],
    "cooking": ["a pinch of salt and butter", "butter in a hot pan", "salt the boiling water"],
}


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path / "corpus", TEXTS)


def by_letter(texts):
    """An encoder that sees whether a text has numbers, and takes one text of math for cooking."""
    return np.array([[float("num" in text and "square" not in text), 1.0 - ("num" in text)] for text in texts]) + 0.01


def test_texts_go_to_the_domain_with_the_nearest_centroid(corpus):
    assert separability(corpus).confusion_DD.tolist() == [[3, 0], [0, 3]]


def test_given_encoder_is_the_one_that_judges(corpus):
    # The text about a square has equal shares of both directions; the centroid of cooking lies nearer to the diagonal.
    found = separability(corpus, by_letter)

    assert found.encoder == "encoder 'function'"
    assert found.confusion_DD.sum(axis=1).tolist() == [3, 3]
    assert found.accuracy["cooking"] == 1.0


@pytest.mark.parametrize("given", ["some/where/model", Path("some/where/model")], ids=["str", "Path"])
def test_an_encoder_in_a_folder_is_called_an_encoder(corpus, monkeypatch, given):
    monkeypatch.setattr(module, "open_encoder", lambda encoder: by_letter)

    assert separability(corpus, given).encoder == "encoder 'model'"


def test_a_domain_of_unlike_texts_has_a_centroid_as_long_as_any(corpus):
    # Degrees: cooking lies on both sides of 90, so the mean of its texts is short; 50 is nearer to 90 than to 0.
    degrees = dict.fromkeys(TEXTS["math"], 0) | dict(zip(TEXTS["cooking"], (30, 150, 90), strict=True)) | {"soup": 50}
    corpus.file("cooking", "test").write_text('{"text": "soup"}\n')

    def encoder(texts):
        return np.array([[np.cos(np.radians(degrees[text])), np.sin(np.radians(degrees[text]))] for text in texts])

    assert separability(corpus, encoder).confusion_DD.tolist() == [[3, 0], [0, 1]]


def test_centroids_come_from_other_texts_than_those_that_are_judged(corpus):
    seen = []

    def encoder(texts):
        seen.extend(texts)
        return np.eye(2)[[int("a" in text) for text in texts]]

    (corpus.folder / "math" / "test.jsonl").write_text('{"text": "only judged"}\n')
    separability(corpus, encoder)

    assert seen.count("only judged") == 1 and seen.count(TEXTS["math"][0]) == 1


def test_words_are_weighed_by_the_texts_that_are_learnt_from(corpus, monkeypatch):
    learnt, tfidf = [], module._tfidf
    monkeypatch.setattr(module, "_tfidf", lambda texts: learnt.extend(texts) or tfidf(texts))
    corpus.file("math", "test").write_text('{"text": "only judged"}\n')
    separability(corpus)

    assert learnt == [text for texts in TEXTS.values() for text in texts]


def test_swapped_domains_are_found_to_be_swapped(corpus):
    first, second = (corpus.file(domain, "test") for domain in TEXTS)
    first_texts = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(first_texts)

    assert separability(corpus).accuracy == {"math": 0.0, "cooking": 0.0}


def test_at_most_so_many_texts_are_embedded_at_even_distances(corpus):
    seen = []

    def encoder(texts):
        seen.extend(texts)
        return np.ones((len(texts), 2))

    separability(corpus, encoder, documents=2)

    assert seen == [TEXTS[domain][place] for _ in ("train", "test") for domain in TEXTS for place in (0, 2)]


def test_one_domain_alone_is_refused(tmp_path, refused):
    corpus = corpus_of(tmp_path / "one", {"math": ["1"]})

    with refused(ConfigurationError, "has 1 domain"):
        separability(corpus)


def test_figure_is_a_picture(corpus, tmp_path):
    assert draw_separability(separability(corpus), tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_no_texts_at_all_are_refused(corpus, refused):
    with refused(ConfigurationError, "0 texts tell nothing"):
        separability(corpus, documents=0)
