"""A dense OLMo-2 model becomes an anchor that computes the same."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import (
    ConfigurationError,
    DuplicateExpertError,
    InvalidExpertNameError,
    NotOlmo2Error,
    UnknownExpertError,
)
from flexolmo_hf.modeling.upcycling import BIAS_START
from tests.conftest import dense_model
from tests.modeling.test_model import LLAMA3_ROPE

DENSE = {
    "plain": {},
    "gqa": {"num_key_value_heads": 1},
    "attention-bias": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "rope-scaling": {"rope_parameters": LLAMA3_ROPE},
    "other-epsilon": {"rms_norm_eps": 0.1},
}


@pytest.fixture(params=DENSE.values(), ids=DENSE.keys())
def dense(request):
    return dense_model(**request.param)


@torch.no_grad()
@pytest.mark.parametrize("source", ["model", "folder"])
def test_with_the_public_expert_alone_it_equals_the_dense_model(dense, tmp_path, input_ids, source):
    dense.save_pretrained(tmp_path)
    model = FlexOlmoForCausalLM.from_dense(dense if source == "model" else tmp_path)

    assert model.expert_names == ["public"]
    assert torch.equal(model(input_ids).logits, dense(input_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("router_bias", [False, True])
@pytest.mark.parametrize("embedded", [False, True], ids=["neutral rows", "given rows"])
def test_with_a_fresh_copy_as_second_expert_it_equals_the_dense_model(dense, input_ids, router_bias, embedded):
    rows = {"public": torch.randn(64), "math": torch.randn(2, 64)} if embedded else None
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows, router_bias=router_bias)

    assert model.expert_names == ["public", "math"]
    torch.testing.assert_close(model(input_ids).logits, dense(input_ids).logits, atol=1e-5, rtol=1e-5)


def test_given_rows_arrive_in_every_layer():
    per_layer, same = torch.randn(2, 64), torch.randn(64)
    model = FlexOlmoForCausalLM.from_dense(
        dense_model(), expert="math", router_embeddings={"public": same, "math": per_layer}
    )

    for layer, mixture in enumerate(model.mixtures):
        assert torch.equal(mixture.gate.weight, torch.stack([same, per_layer[layer]]))


def test_without_rows_every_expert_takes_an_equal_share(input_ids):
    model = FlexOlmoForCausalLM.from_dense(dense_model(), expert="math")

    assert all(torch.count_nonzero(mixture.gate.weight) == 0 for mixture in model.mixtures)


def test_the_public_expert_starts_without_bias_and_the_new_one_below_zero():
    model = FlexOlmoForCausalLM.from_dense(dense_model(), expert="math", router_bias=True)

    assert BIAS_START < 0
    assert all(mixture.gate.bias.tolist() == [0.0, BIAS_START] for mixture in model.mixtures)


def test_neither_the_dense_model_nor_the_two_experts_share_memory():
    dense = dense_model()
    before = dense.model.layers[0].mlp.up_proj.weight.clone()
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math")
    public, math = (model.expert_modules(name)[0].up_proj.weight.data for name in ("public", "math"))
    math.zero_()

    assert torch.equal(public, before)
    public.zero_()
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, before)


def test_the_precision_of_the_dense_model_is_kept():
    model = FlexOlmoForCausalLM.from_dense(dense_model().to(torch.bfloat16), expert="math")

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("source", ["model", "folder"])
def test_a_dense_model_that_is_not_olmo2_is_refused(tmp_path, source):
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    llama = LlamaForCausalLM(config)
    llama.save_pretrained(tmp_path)

    with pytest.raises(NotOlmo2Error, match="'llama'"):
        FlexOlmoForCausalLM.from_dense(llama if source == "model" else tmp_path)


REFUSED = {
    "a path as name": ({"expert": "../math"}, InvalidExpertNameError),
    "a hidden name": ({"expert": ".math"}, InvalidExpertNameError),
    "a long name": ({"expert": "m" * 65}, InvalidExpertNameError),
    "the public name": ({"expert": "public"}, DuplicateExpertError),
    "the public name in capitals": ({"expert": "Public"}, DuplicateExpertError),
    "a row of another expert": ({"expert": "math", "router_embeddings": {"code": torch.ones(64)}}, UnknownExpertError),
    "a row of another width": ({"expert": "math", "router_embeddings": {"math": torch.ones(63)}}, ConfigurationError),
    "a row with NaN": (
        {"expert": "math", "router_embeddings": {"math": torch.full((64,), torch.nan)}},
        ConfigurationError,
    ),
    "loading options for a loaded model": ({"dtype": torch.float32}, ConfigurationError),
}


@pytest.mark.parametrize(("options", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_meant_is_refused(options, error):
    with pytest.raises(error):
        FlexOlmoForCausalLM.from_dense(dense_model(), **options)
