"""One token of one row through a decoder layer on a CPU, as in decoding: the layer's own steps, in few operations.

Every weight is read once for each token and drives all else out of the cores' caches, so that each operation between
two products waits for its own code before it touches a few kilobytes. What counts is how many there are: the modules
take about ninety in a layer, this about thirty.

Shape letters: H hidden, D width of a head, G heads of queries, J heads of keys, P = G + J.
"""

import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm
from flexolmo_hf.modeling.untouched import is_untouched, nothing_watches

# What attention is told in decoding. With more, its outcome may be another.
_TOLD = {
    *("position_embeddings", "position_ids", "attention_mask", "past_key_values", "use_cache"),
    *("output_router_logits", "output_hidden_states"),
}


class Weights(NamedTuple):
    """What a decoder layer multiplies by, its mixture left out."""

    queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    output: torch.Tensor
    query_norm: torch.Tensor
    key_norm: torch.Tensor
    attention_norm: torch.Tensor
    mixture_norm: torch.Tensor


def plain_weights(layer: nn.Module, hidden: torch.Tensor, told: dict[str, Any]) -> Weights | None:
    """Return the weights of a layer whose attention and norms need not be called themselves.

    Args:
        layer: A decoder layer.
        hidden: What it is to work on.
        told: The keywords for its attention.

    Returns:
        Nothing where there is more than one token, where there is no CPU, or gradient, autocast or a compiler, for
        other numbers than float32, where a module has a hook, an adapter, a bias, or weights of
        another kind, and where attention is not torch's.
    """
    if hidden.shape[:2] != (1, 1) or not nothing_watches(hidden):
        return None
    modules = layer.__dict__["_modules"]
    attention = modules["self_attn"]
    state = attention.__dict__
    if _forwards() != _FORWARDS or not is_untouched(state) or not told.keys() <= _TOLD:
        return None
    # Another interface may ask for more than `attend` gives, or give more.
    if ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, None) is not sdpa_attention_forward:
        return None
    if attention.training and attention.attention_dropout:
        return None
    inner = state["_modules"]
    found = [
        *(_weight(inner[name], FewRowsLinear) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        *(_weight(inner[name], FlexOlmoRMSNorm) for name in ("q_norm", "k_norm")),
        *(_weight(modules[f"post_{name}_layernorm"], FlexOlmoRMSNorm) for name in ("attention", "feedforward")),
    ]
    # `None in found` would have torch compare every tensor with it.
    return None if any(weight is None for weight in found) else Weights(*found)  # type: ignore[arg-type]


def attend(
    attention: Any,
    token_H: torch.Tensor,
    weights: Weights,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    cache: Any,
) -> torch.Tensor:
    """Let one token look at those before it.

    Args:
        attention: The layer's attention, which says how.
        token_H: The token's residual stream.
        weights: From `plain_weights`.
        position_embeddings: Cosines and sines of its position, ``(1, 1, D)`` each.
        attention_mask: As upstream.
        cache: Keys and values of the tokens before, to which its own are added; None for none.

    Returns:
        The output ``(H,)`` before its norm.
    """
    width = attention.head_dim
    at = _MEMORY.take(token_H, weights, width)
    torch.mv(weights.queries, token_H, out=at.queries)
    torch.mv(weights.keys, token_H, out=at.keys)
    values = torch.mv(weights.values, token_H).view(1, -1, 1, width)
    epsilon = attention.q_norm.variance_epsilon
    torch.addcmul(_ZERO, at.queries, weights.query_norm, value=_scale(at.queries, epsilon), out=at.queries)
    epsilon = attention.k_norm.variance_epsilon
    torch.addcmul(_ZERO, at.keys, weights.key_norm, value=_scale(at.keys, epsilon), out=at.keys)
    cosines, sines = position_embeddings
    turned_1P1D = at.halves.flip(2).view_as(at.heads)
    heads_1P1D = (at.heads * cosines).addcmul_(turned_1P1D, at.signed(sines))
    queries, keys = heads_1P1D.split_with_sizes(at.counts, 1)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    if attention.num_key_value_groups == 1:
        seen = F.scaled_dot_product_attention(queries, keys, values, attention_mask, scale=attention.scaling)
    else:
        seen, _ = sdpa_attention_forward(attention, queries, keys, values, attention_mask, scaling=attention.scaling)
    return torch.mv(weights.output, seen.reshape(-1))


def add_normed(residual_H: torch.Tensor, output_H: torch.Tensor, norm: Any, weight_H: torch.Tensor) -> torch.Tensor:
    """Return ``residual + norm(output)``, ``(H,)``."""
    return torch.addcmul(residual_H, output_H, weight_H, value=_scale(output_H, norm.variance_epsilon))


class _Memory(threading.local):
    """What is written into for every token, cut into views; each thread has its own.

    Attributes:
        queries: ``(G * D,)``.
        keys: ``(J * D,)``, right after the queries.
        heads: Both, ``(1, P, 1, D)``.
        halves: Both, ``(1, P, 2, D / 2)``.
        counts: G and J.
    """

    def __init__(self) -> None:
        self.shape: Any = None
        self.sines: torch.Tensor | None = None

    def take(self, token_H: torch.Tensor, weights: Weights, width: int) -> "_Memory":
        """Make it fit, and return it."""
        wide, narrow = weights.queries.shape[0], weights.keys.shape[0]
        # Memory from inference mode may only be written there.
        shape = (wide, narrow, width, torch.is_inference_mode_enabled())
        if shape != self.shape:
            # Whatever interrupts what follows leaves nothing that seems to fit.
            self.shape = None
            both = token_H.new_empty(wide + narrow)
            self.queries, self.keys = both[:wide], both[wide:]
            self.heads, self.halves = both.view(1, -1, 1, width), both.view(1, -1, 2, width // 2)
            self.counts = [wide // width, narrow // width]
            self.shape = shape
        return self

    def signed(self, sines_11D: torch.Tensor) -> torch.Tensor:
        """Return the sines with which the exchanged halves of a head are multiplied, for all layers of a token."""
        if sines_11D is not self.sines:
            first, second = sines_11D.chunk(2, dim=-1)
            self.signed_sines = torch.cat([-first, second], dim=-1)
            self.sines = sines_11D
        return self.signed_sines


_MEMORY = _Memory()
_ZERO = torch.zeros(1)


def _scale(token: torch.Tensor, epsilon: float) -> float:
    """Return one over the root mean square."""
    square = torch.dot(token, token).item() / len(token) + epsilon
    return square**-0.5 if square else float("inf")


def _weight(module: Any, kind: type) -> torch.Tensor | None:
    state = module.__dict__
    if type(module) is not kind or not is_untouched(state) or state["_parameters"].get("bias") is not None:
        return None
    weight = state["_parameters"]["weight"]
    return weight if type(weight) is nn.Parameter and weight.dtype == torch.float32 else None


def _forwards() -> tuple[Any, ...]:
    return (
        upstream.FlexOlmoAttention.forward,
        upstream.apply_rotary_pos_emb,
        FlexOlmoRMSNorm.forward,
        FewRowsLinear.forward,
    )


# Some libraries replace what a whole class does.
_FORWARDS = _forwards()
