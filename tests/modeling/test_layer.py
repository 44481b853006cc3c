"""Attention and norms compute what upstream's compute."""

import pytest
import torch
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling import few_rows, layer
from flexolmo_hf.modeling.layer import FlexOlmoRMSNorm
from tests.modeling.test_expert_sets import named_model


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_norm_is_upstreams(tokens, dtype, eps):
    ours, theirs = (kind(128, eps=eps).to(dtype) for kind in (FlexOlmoRMSNorm, upstream.FlexOlmoRMSNorm))
    values = torch.rand(128)
    ours.weight.data.copy_(values)
    theirs.weight.data.copy_(values)
    hidden = torch.randn(2, tokens, 128, dtype=dtype) * 3
    kept = hidden.clone()
    exact = dtype == torch.bfloat16
    assert torch.equal(ours(hidden), theirs(hidden))
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden), theirs(hidden), atol=0 if exact else 2e-6, rtol=0 if exact else 2e-6)
    assert torch.equal(hidden, kept)


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"num_key_value_heads": 1}])
@torch.no_grad()
def test_few_rows_change_no_logit(monkeypatch, input_ids, changes):
    model = named_model(**changes)
    expected = model(input_ids[:, :2]).logits
    monkeypatch.setattr(few_rows, "_SMALL", 0)
    monkeypatch.setattr(layer, "_SMALL", 0)
    torch.testing.assert_close(model(input_ids[:, :2]).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_layers_have_upstreams_names():
    config = named_model().config
    stock = upstream.FlexOlmoAttention(config, 0).state_dict()
    ours = layer.FlexOlmoAttention(config, 0).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in stock.items()}
