"""A model whose routing is known by hand: what a token's embedding says is what every router scores."""

import math

import pytest
import torch

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from tests.conftest import TINY, byte_tokenizer

EXPERTS = ["public", "math", "code"]
#: Weights of the three experts, in both layers, for the character; every other character is like "p".
ROUTED = {"p": (0.5, 0.25, 0.25), "m": (0.125, 0.75, 0.125), "c": (0.25, 0.125, 0.625)}
#: In the second layer, the rows of math and code are swapped.
SWAPPED = {character: (public, code, math_) for character, (public, math_, code) in ROUTED.items()}


def known_model(per_token=3, orders=((0, 1, 2), (0, 2, 1)), **changes):
    """Build a model whose mixtures add nothing, so that each layer's input is the embedding.

    In a layer, each expert has the weight that `ROUTED` gives to the one whose place its order names.
    """
    tokenizer = byte_tokenizer()
    settings = {**TINY, "vocab_size": len(tokenizer), "num_hidden_layers": len(orders), "expert_names": EXPERTS}
    config = FlexOlmoConfig(**{**settings, "num_experts": 3, "num_experts_per_tok": per_token, **changes})
    model = FlexOlmoForCausalLM(config).eval()
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.zero_()
        embeddings[:, :3] = torch.tensor([math.log(weight) for weight in ROUTED["p"]])
        for character, weights in ROUTED.items():
            (token,) = tokenizer(character)["input_ids"]
            embeddings[token, :3] = torch.tensor([math.log(weight) for weight in weights])
        for order, layer in zip(orders, model.model.layers, strict=True):
            # OLMo-2 normalises what attention and mixture add: without the norms' weights, nothing is added.
            layer.post_attention_layernorm.weight.zero_()
            layer.post_feedforward_layernorm.weight.zero_()
            layer.mlp.gate.weight.zero_()
            for expert, source in enumerate(order):
                layer.mlp.gate.weight[expert, source] = 1.0
    return model


@pytest.fixture
def model():
    return known_model()
