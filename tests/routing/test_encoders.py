"""Encoders: sentence-transformers models, given as objects, folders or names, are used as they are."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from flexolmo_hf import domain_embedding
from flexolmo_hf.errors import CheckpointNotFoundError, ConfigurationError, MissingExtraError

TEXTS = ["one two", "two three three", "one"]


@pytest.fixture
def sentence_model():
    """A sentence-transformers model of three words, built in code."""
    transformers = pytest.importorskip("sentence_transformers")
    static = pytest.importorskip("sentence_transformers.models").StaticEmbedding
    words = Tokenizer(models.WordLevel({"one": 0, "two": 1, "three": 2, "[UNK]": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    weights = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    return transformers.SentenceTransformer(modules=[static(words, embedding_weights=weights)], device="cpu")


def test_a_sentence_transformers_model_is_used_as_it_is(sentence_model):
    found = domain_embedding(TEXTS, encoder=sentence_model, scale=None)

    assert np.allclose(found.vector.numpy(), sentence_model.encode(TEXTS).mean(axis=0), atol=1e-6)
    assert found.projection.encoder_width == 8


@pytest.mark.parametrize("kind", [str, lambda path: path], ids=["str", "path"])
def test_its_folder_does_the_same_and_stays_unnamed(tmp_path, sentence_model, kind):
    sentence_model.save_pretrained(str(tmp_path / "encoder"))
    found = domain_embedding(TEXTS, encoder=kind(tmp_path / "encoder"), scale=None)

    assert torch.allclose(found.vector, domain_embedding(TEXTS, encoder=sentence_model, scale=None).vector, atol=1e-6)
    assert found.projection.encoder == ""


def test_a_repository_out_of_reach_is_named():
    with pytest.raises(CheckpointNotFoundError, match="owner/encoder"):
        domain_embedding(TEXTS, encoder="owner/encoder")


def test_a_missing_library_brings_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("flexolmo_hf._extras.find_spec", lambda module: None)

    with pytest.raises(MissingExtraError, match=r"flexolmo-hf\[routing\]"):
        domain_embedding(TEXTS, encoder=str(tmp_path))


def test_a_function_may_return_a_tensor_on_any_dtype():
    found = domain_embedding(TEXTS, encoder=lambda batch: torch.ones(len(batch), 4, dtype=torch.bfloat16), scale=None)

    assert torch.equal(found.vector, torch.ones(4))


def test_a_folder_that_holds_something_else_is_no_encoder(tmp_path):
    pytest.importorskip("sentence_transformers")
    (tmp_path / "notes").mkdir()
    with pytest.raises(ConfigurationError, match="'notes' holds no encoder"):
        domain_embedding(TEXTS, encoder=str(tmp_path / "notes"), hidden_size=8)
