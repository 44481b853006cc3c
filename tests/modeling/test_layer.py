"""Attention computes what upstream's computes."""

import pytest
import torch
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling import few_rows, layer, norm
from tests.modeling.test_expert_sets import named_model


@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"num_key_value_heads": 1}])
@torch.no_grad()
def test_few_rows_change_no_logit(monkeypatch, input_ids, changes):
    model = named_model(**changes)
    expected = model(input_ids[:, :2]).logits
    monkeypatch.setattr(few_rows, "_SMALL", 0)
    monkeypatch.setattr(norm, "_SMALL", 0)
    torch.testing.assert_close(model(input_ids[:, :2]).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_layers_have_upstreams_names():
    config = named_model().config
    stock = upstream.FlexOlmoAttention(config, 0).state_dict()
    ours = layer.FlexOlmoAttention(config, 0).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in stock.items()}
