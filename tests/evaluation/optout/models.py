"""Tiny models and texts for the opt-out matrix."""

import torch

from tests.conftest import byte_tokenizer
from tests.modeling.test_expert_sets import named_model

TEXTS = {
    "public": ["The quick brown fox.", "jumps", "over the lazy dog, and over the fence as well."],
    "math": ["1 + 1 = 2", "12 * 12 = 144 and 13 * 13 = 169", "7"],
    "verse": ["Tyger Tyger, burning bright", "In the forests of the night"],
}


def byte_model(per_token=4, **changes):
    """Return four named experts over bytes."""
    return named_model(per_token, vocab_size=len(byte_tokenizer()), **changes)


def specialist(expert="math", symbols="0123456789+*= "):
    """Return a model in which one expert makes some bytes likely, and no other expert does anything.

    Of the hidden width the first dimension is the expert's: it writes there and nobody else, and the head reads the
    bytes from there.
    """
    model = byte_model()
    tokenizer = byte_tokenizer()
    own = torch.tensor(sorted({token for symbol in symbols for token in tokenizer(symbol)["input_ids"]}))
    with torch.no_grad():
        model.lm_head.weight[:, 0] = 0
        model.lm_head.weight[own, 0] = 0.5
        for mixture in model.mixtures:
            for name in model.expert_names:
                mixture.experts[str(model.expert_names.index(name))].down_proj.weight.zero_()
        for mixture, layer in zip(model.mixtures, model.model.layers, strict=True):
            mixture.gate.weight.zero_()
            network = mixture.experts[str(model.expert_names.index(expert))]
            # Always positive: the product of gate and up is a sum of squares times a share.
            network.up_proj.weight.copy_(network.gate_proj.weight)
            network.down_proj.weight[0] = 1.0
            layer.post_feedforward_layernorm.weight.zero_()
            layer.post_feedforward_layernorm.weight[0] = 1.0
    return model
