"""A domain embedding is the mean of what an encoder gives, projected and scaled, with every lost document counted."""

import logging
import traceback

import numpy as np
import pytest
import torch

from flexolmo_hf import domain_embedding
from flexolmo_hf.errors import ConfigurationError, FlexOlmoError
from flexolmo_hf.modeling.embedded_row import RouterProjection
from flexolmo_hf.routing.hidden_states import HiddenStates
from flexolmo_hf.routing.projection import orthonormal_projection
from tests.conftest import TINY, dense_model

SECRET = "a very private sentence"
WIDTH = 6


def encode(texts):
    """Give each text a vector that depends on it alone."""
    return np.stack([np.random.default_rng(sum(text.encode())).normal(size=WIDTH) for text in texts])


def texts(count):
    return [f"document {number}" for number in range(count)]


def test_it_is_the_mean_of_the_embeddings():
    found = domain_embedding(texts(70), encoder=encode, scale=None)

    assert found.vector.dtype == torch.float32
    assert np.allclose(found.vector.numpy(), encode(texts(70)).mean(axis=0), atol=1e-6)
    assert (found.documents, found.dropped) == (70, 0)
    assert found.projection == RouterProjection(WIDTH, None, "")


def test_the_size_of_a_batch_changes_nothing():
    one = domain_embedding(texts(70), encoder=encode, batch_size=1)

    assert torch.allclose(domain_embedding(texts(70), encoder=encode, batch_size=33).vector, one.vector, atol=1e-6)


def test_another_width_is_projected_with_the_seed_that_is_remembered():
    found = domain_embedding(texts(9), encoder=encode, hidden_size=10, seed=3, scale=None, encoder_name="owner/name")
    mean = torch.from_numpy(encode(texts(9)).mean(axis=0))

    assert torch.allclose(found.vector, (mean @ orthonormal_projection(WIDTH, 10, seed=3)).float(), atol=1e-6)
    assert found.projection == RouterProjection(WIDTH, 3, "owner/name")
    assert found.vector.norm().item() == pytest.approx(mean.norm().item(), rel=1e-5)


def test_the_hidden_size_itself_is_not_projected():
    found = domain_embedding(texts(9), encoder=encode, hidden_size=WIDTH, seed=3, scale=None)

    assert torch.equal(found.vector, domain_embedding(texts(9), encoder=encode, scale=None).vector)
    assert found.projection.seed is None


@pytest.mark.parametrize("hidden_size", [4, 6, 10])
def test_a_row_has_the_norm_of_the_reference_repository_or_the_one_asked_for(hidden_size):
    kept = {"encoder": encode, "hidden_size": hidden_size}
    plain = domain_embedding(texts(9), **kept, scale=None).vector

    assert 0.41 <= domain_embedding(texts(9), **kept).vector.norm() <= 0.55
    scaled = domain_embedding(texts(9), **kept, scale=2.0)
    assert torch.allclose(scaled.vector, plain * 2 / plain.norm(), atol=1e-6)
    assert scaled.scale == 2.0


def test_at_most_the_sample_is_embedded_and_the_same_seed_embeds_the_same():
    seen = []

    def counting(batch):
        seen.extend(batch)
        return encode(batch)

    first = domain_embedding(iter(texts(500)), encoder=counting, sample=40, seed=7)
    assert len(seen) == first.documents == 40

    assert torch.equal(domain_embedding(texts(500), encoder=encode, sample=40, seed=7).vector, first.vector)
    assert not torch.equal(domain_embedding(texts(500), encoder=encode, sample=40, seed=8).vector, first.vector)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_documents_without_a_finite_embedding_are_dropped_and_counted(bad, caplog):
    def sometimes_bad(batch):
        rows = encode(batch)
        rows[[text == SECRET for text in batch], 2] = bad
        return rows

    found = domain_embedding([*texts(9), SECRET, " ", "", SECRET], encoder=sometimes_bad, batch_size=4)

    assert torch.equal(found.vector, domain_embedding(texts(9), encoder=encode, batch_size=4).vector)
    assert (found.documents, found.empty, found.non_finite, found.dropped) == (9, 2, 2, 4)
    assert "2 of 11 documents were left out" in caplog.text
    assert SECRET not in caplog.text


def test_nothing_is_logged_when_all_is_well(caplog):
    caplog.set_level(logging.DEBUG, logger="flexolmo_hf")
    domain_embedding(["", SECRET], encoder=encode)

    assert caplog.records == []


def test_the_anchor_can_be_the_encoder(tokenizer):
    model = dense_model(vocab_size=len(tokenizer))
    options = {"encoder": "self", "model": model, "tokenizer": tokenizer, "scale": None}
    found = domain_embedding(texts(5), **options)
    layered = domain_embedding(texts(5), **options, per_layer=True)

    expected = HiddenStates(model, tokenizer, per_layer=True)(texts(5)).mean(dim=0)
    assert torch.allclose(layered.vector, expected, atol=1e-5)
    assert torch.allclose(found.vector, expected.mean(dim=0), atol=1e-5)
    assert found.projection == layered.projection == RouterProjection(TINY["hidden_size"], None, "self")


def test_each_layer_has_a_row_of_the_norm_asked_for(tokenizer):
    model = dense_model(vocab_size=len(tokenizer))
    options = {"encoder": "self", "model": model, "tokenizer": tokenizer, "per_layer": True}
    norms = domain_embedding(texts(5), **options, scale=0.3).vector.norm(dim=1)

    assert torch.allclose(norms, torch.full_like(norms, 0.3))


def changing_width(batch):
    changing_width.calls += 1
    return np.ones((len(batch), changing_width.calls))


REFUSED = {
    "no text": ({"texts": []}, "No document could be used: 0 are empty"),
    "only empty texts": ({"texts": [" ", ""]}, "2 are empty"),
    "only NaN": ({"encoder": lambda batch: np.full((len(batch), 3), np.nan)}, "3 have an embedding that is not finite"),
    "one text": ({"texts": SECRET}, "Put it into a list"),
    "a vector": ({"encoder": lambda batch: np.ones(3)}, "shape (3,) for 3 texts"),
    "too few rows": ({"encoder": lambda batch: np.ones((1, 3))}, "shape (1, 3) for 3 texts"),
    "no width": ({"encoder": lambda batch: np.ones((len(batch), 0))}, "shape (3, 0)"),
    "ragged": ({"encoder": lambda batch: [[1], [1, 2], [3]]}, "no array of numbers"),
    "words": ({"encoder": lambda batch: list(batch)}, "no array of numbers"),
    "two widths": ({"encoder": changing_width, "batch_size": 2}, "width 1 and then of width 2"),
    "zero": ({"encoder": lambda batch: np.zeros((len(batch), 3))}, "no direction"),
    "no encoder": ({"encoder": 3}, "A int is no encoder"),
    "a folder that is not there": ({"encoder": "/nowhere/private/encoder"}, "'encoder'"),
    "a scale of zero": ({"scale": 0.0}, "scale is 0.0"),
    "a scale that is NaN": ({"scale": float("nan")}, "scale is nan"),
    "a negative seed": ({"seed": -1}, "seed is -1"),
    "no batch": ({"batch_size": 0}, "batch_size is 0"),
    "no hidden size": ({"hidden_size": 0}, "hidden_size is 0"),
    "a path for a name": ({"encoder_name": "/private/encoder"}, "name is not one that can be published"),
    "the anchor without a model": ({"encoder": "self"}, "model or tokenizer is not given"),
    "a model for another encoder": ({"model": object()}, "are for encoder='self'"),
    "layers of another encoder": ({"per_layer": True}, "are for encoder='self'"),
}


@pytest.mark.parametrize(("changes", "says"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_in_one_sentence_without_private_text(changes, says):
    changing_width.calls = 0
    settings = {"texts": [SECRET, "b", "c"], "encoder": encode, **changes}
    with pytest.raises(FlexOlmoError) as caught:
        domain_embedding(settings.pop("texts"), **settings)

    assert says in str(caught.value)
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    assert "/private" not in str(caught.value)


@pytest.mark.parametrize("changes", [{"hidden_size": 65}, {"encoder_name": "owner/name"}], ids=str)
def test_what_contradicts_the_anchor_as_the_encoder_is_refused(tokenizer, changes):
    model = dense_model(vocab_size=len(tokenizer))
    with pytest.raises(ConfigurationError):
        domain_embedding(["a"], encoder="self", model=model, tokenizer=tokenizer, **changes)
