"""What cannot give proxy data is refused in one sentence, which shows no document."""

import re
import traceback

import numpy as np
import pytest

from flexolmo_hf import ProxySettings, select_proxy
from flexolmo_hf.errors import CheckpointNotFoundError, ConfigurationError, FlexOlmoError, TooFewDocumentsError
from tests.routing.proxy_corpora import documents, encode, public_corpus

pytest.importorskip("sklearn")

PUBLIC, _ = public_corpus()
PRIVATE = [f"{text} secret{number}" for number, text in enumerate(documents("algebra", 60, seed=1))]


def all_nan(texts):
    return np.full((len(texts), 4), np.nan)


def one_vector(texts):
    return np.ones(4)


class Widening:
    """An encoder whose embeddings grow."""

    calls = 0

    def __call__(self, texts):
        self.calls += 1
        return np.ones((len(texts), self.calls))


class NaN:
    """A classifier that has diverged."""

    def fit(self, texts, unit_NW, private_N, *, seed):
        """Learn nothing."""

    def log_odds(self, texts, unit_NW):
        return np.full(len(texts), np.nan)


def drained():
    texts = iter(PUBLIC)
    return lambda: texts


REFUSED = {
    "no private document": ({"private": []}, TooFewDocumentsError, "0 private documents can be used"),
    "few private documents": ({"private": PRIVATE[:19]}, TooFewDocumentsError, "19 private documents .* least 20"),
    "blank private documents": (
        {"private": [*PRIVATE[:5], *[" "] * 40]},
        TooFewDocumentsError,
        r"5 private documents can be used \(40 empty\)",
    ),
    "no public document": ({"public": []}, TooFewDocumentsError, "0 public documents can be used"),
    "an empty public stream": ({"public": iter([])}, TooFewDocumentsError, "0 public documents can be used"),
    "fewer than wanted": ({"n": len(PUBLIC) + 1}, TooFewDocumentsError, "330 public documents .* least 331"),
    "fewer different ones than wanted": (
        {"public": PUBLIC[:100] * 2, "n": 150},
        TooFewDocumentsError,
        r"100 public documents can be used \(100 repeated\), and at least 150",
    ),
    "embeddings of NaN": (
        {"encoder": all_nan},
        TooFewDocumentsError,
        r"0 private documents can be used \(60 without a usable embedding .* try the encoder on one of them",
    ),
    "one vector for all": ({"encoder": one_vector}, ConfigurationError, r"shape \(4,\)"),
    "words for numbers": ({"encoder": list}, ConfigurationError, "a list that is no array of numbers"),
    "another width": ({"encoder": Widening(), "batch_size": 40}, ConfigurationError, r"shape \(20, 2\)"),
    "no encoder": ({"encoder": 7}, ConfigurationError, "int is no encoder"),
    "no such folder": ({"encoder": "./nowhere"}, CheckpointNotFoundError, "nowhere"),
    "no number": ({"n": 0}, ConfigurationError, "n is 0"),
    "one string": ({"private": "a secret"}, ConfigurationError, "private texts are one string"),
    "rows for texts": ({"private": [{"text": "secret"}] * 30}, ConfigurationError, "Document 0 of the private texts"),
    "an unknown classifier": ({"classifier": "forest"}, ConfigurationError, "classifier is 'forest'"),
    "nothing to fine-tune": ({"classifier": "finetune"}, ConfigurationError, "FineTunedClassifier"),
    "a classifier of NaN": ({"classifier": NaN()}, ConfigurationError, "not finite"),
    "a long private stream": (
        {"private": iter(PRIVATE), "train_private": 30},
        ConfigurationError,
        "more than 30 documents",
    ),
    "a function without an end": ({"public": drained()}, ConfigurationError, "330 documents .* and 0 at the second"),
}


@pytest.mark.parametrize(("changes", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_named_without_showing_a_document(changes, error, says, capfd):
    named = {"public": PUBLIC, "private": PRIVATE, "n": 20, "encoder": encode, "classifier": "logistic"}
    given = {key: changes.get(key, value) for key, value in named.items()}
    settings = ProxySettings(**{key: value for key, value in changes.items() if key not in named})

    with pytest.raises(FlexOlmoError) as caught:
        select_proxy(given.pop("public"), given.pop("private"), settings=settings, **given)
    said = str(caught.value) + "".join(capfd.readouterr())

    assert type(caught.value) is error
    assert re.search(says, str(caught.value))
    assert "secret" not in said + "".join(traceback.format_exception(caught.value))
    assert not any(text in said for text in PUBLIC)


@pytest.mark.parametrize(
    "setting",
    [
        {"train_public": 19},
        {"train_private": 3},
        {"candidates": 0},
        {"batch_size": 0},
        {"held_out": 0.0},
        {"held_out": 0.9},
        {"cosine_limit": 0.0},
        {"overlap_limit": 1.5},
        {"relevance": -1.0},
        {"relevance": float("nan")},
        {"held_out": float("nan")},
        {"cosine_limit": float("nan")},
    ],
    ids=str,
)
def test_a_setting_without_meaning_is_refused_by_name(setting):
    (name,) = setting

    with pytest.raises(ConfigurationError, match=f"{name} is "):
        ProxySettings(**setting)


def test_a_missing_library_is_named_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setattr("flexolmo_hf._extras.find_spec", lambda module: None)

    with pytest.raises(ImportError, match=r"pip install 'flexolmo-hf\[routing\]'"):
        select_proxy(PUBLIC, PRIVATE, n=20, encoder=encode)
