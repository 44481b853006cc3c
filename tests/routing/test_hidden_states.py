"""The anchor as an encoder: a text's embedding is the mean of what each layer's router would see of it."""

import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, ExpertNotLoadedError, NotOlmo2Error
from flexolmo_hf.routing.hidden_states import HiddenStates
from tests.conftest import TINY, dense_model
from tests.modeling.test_expert_sets import named_model, poison

TEXTS = ["one", "two words", "a third text, longer than the others"]


def seen_by_routers(model, ids):
    """Record what each router is given, without going through the code under test."""
    seen = []
    hooks = [
        mixture.gate.register_forward_hook(lambda m, given, out: seen.append(given[0])) for mixture in model.mixtures
    ]
    with torch.no_grad():
        model(ids, active_experts=["public"])
    for hook in hooks:
        hook.remove()
    return torch.stack([states[0].mean(dim=0) for states in seen])


@pytest.fixture
def dense(tokenizer):
    return dense_model(vocab_size=len(tokenizer))


@pytest.fixture
def mixture(tokenizer):
    return named_model(vocab_size=len(tokenizer))


def test_an_embedding_is_the_mean_of_what_the_routers_see(mixture, tokenizer):
    found = HiddenStates(mixture, tokenizer, per_layer=True)(TEXTS)

    assert found.shape == (3, TINY["num_hidden_layers"], TINY["hidden_size"])
    for text, embedding in zip(TEXTS, found, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert torch.allclose(embedding, seen_by_routers(mixture, ids), atol=1e-5)


def test_without_layers_it_is_their_mean(mixture, tokenizer):
    layers = HiddenStates(mixture, tokenizer, per_layer=True)(TEXTS)

    assert torch.allclose(HiddenStates(mixture, tokenizer)(TEXTS), layers.mean(dim=1), atol=1e-6)


def test_a_dense_model_and_the_model_made_of_it_embed_alike(dense, tokenizer):
    made = FlexOlmoForCausalLM.from_dense(dense, expert="math")

    expected = HiddenStates(dense, tokenizer, per_layer=True)(TEXTS)
    assert torch.allclose(HiddenStates(made, tokenizer, per_layer=True)(TEXTS), expected, atol=1e-5)


def test_padding_takes_no_part(dense, tokenizer):
    encode = HiddenStates(dense, tokenizer)

    alone = torch.cat([encode([text]) for text in TEXTS])
    assert torch.allclose(encode(TEXTS), alone, atol=1e-5)


def test_only_the_public_expert_takes_part_and_the_set_in_force_stays(mixture, tokenizer):
    mixture.set_active_experts(["math", "code"])
    before = HiddenStates(mixture, tokenizer)(TEXTS)
    poison(mixture, ["math", "code", "news"])

    assert torch.equal(HiddenStates(mixture, tokenizer)(TEXTS), before)
    assert mixture.active_experts == ["math", "code"]


def test_no_more_tokens_than_allowed_are_read(dense, tokenizer):
    short = HiddenStates(dense, tokenizer, max_length=3)

    assert torch.equal(short(["abcdef"]), short(["abc"]))
    assert HiddenStates(dense, tokenizer, max_length=10**6).max_length == TINY["max_position_embeddings"]


def test_a_text_without_tokens_has_no_embedding(dense, tokenizer):
    found = HiddenStates(dense, tokenizer)(["", "a"])

    assert found[0].isnan().all()
    assert found[1].isfinite().all()


def test_the_model_is_left_as_it_was(dense, tokenizer):
    dense.train()
    HiddenStates(dense, tokenizer)(TEXTS)

    assert dense.training
    assert not any(layer.mlp._forward_pre_hooks for layer in dense.model.layers)


def test_a_model_of_another_architecture_is_refused(tokenizer):
    with pytest.raises(NotOlmo2Error):
        HiddenStates(torch.nn.Linear(2, 2), tokenizer)


def test_a_model_without_its_public_expert_is_refused(tmp_path, mixture, tokenizer):
    mixture.save_pretrained(tmp_path)
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["math"])

    with pytest.raises(ExpertNotLoadedError):
        HiddenStates(model, tokenizer)


def test_a_missing_tokenizer_is_refused(dense):
    with pytest.raises(ConfigurationError, match="tokenizer"):
        HiddenStates(dense, None)
