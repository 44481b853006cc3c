"""One token of each row through a decoder layer on a CPU, as in decoding: the layer's own steps, in few operations.

Every weight is read once for each token and drives all else out of the cores' caches, so that each operation between
two products waits for its own code before it touches a few kilobytes. What counts is how many there are: with four
experts and one row, the modules of a layer take 65 that compute, and this 39.

Shape letters: B rows, H hidden, D width of a head, G heads of queries, J heads of keys, P = G + J.
"""

import threading
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling.few_rows import FewRowsLinear, multiply
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm, scale_rows
from flexolmo_hf.modeling.untouched import is_untouched, nothing_watches, plain_weight

# With more rows, what lies between the products is small beside them.
_MOST_ROWS = 32
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
        Nothing where a row has more than one token or there are many rows; where there is no CPU, or gradient, autocast
        or a compiler; for other numbers than float32; where a module has a hook, an adapter, a bias, or weights of
        another kind; and where attention is not torch's.
    """
    if hidden.shape[1] != 1 or len(hidden) > _MOST_ROWS or not nothing_watches(hidden):
        return None
    modules = layer.__dict__["_modules"]
    attention = modules["self_attn"]
    state = attention.__dict__
    if _forwards() != _FORWARDS or getattr(type(attention), "forward", None) is not _FORWARDS[0]:
        return None
    if not is_untouched(state) or not told.keys() <= _TOLD:
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
    tokens_BH: torch.Tensor,
    weights: Weights,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor | None,
    cache: Any,
) -> torch.Tensor:
    """Let one token of each row look at those before it.

    Args:
        attention: The layer's attention, which says how.
        tokens_BH: The tokens' residual stream.
        weights: From `plain_weights`.
        position_embeddings: Cosines and sines of their positions, ``(B, 1, D)`` each, or ``(1, 1, D)``.
        attention_mask: As upstream.
        cache: Keys and values of the tokens before, to which their own are added; None for none.

    Returns:
        The output ``(B, H)`` before its norm.
    """
    width = attention.head_dim
    at = _MEMORY.take(tokens_BH, weights, width)
    _multiply(tokens_BH, weights.queries, at.queries)
    _multiply(tokens_BH, weights.keys, at.keys)
    values = _multiply(tokens_BH, weights.values).view(len(tokens_BH), -1, 1, width)
    for states, norm, weight in (
        (at.queries, attention.q_norm, weights.query_norm),
        (at.keys, attention.k_norm, weights.key_norm),
    ):
        if len(tokens_BH) == 1:
            torch.addcmul(_ZERO, states, weight, value=_scale(states, norm.variance_epsilon), out=states)
        else:
            states.mul_(scale_rows(states, norm.variance_epsilon)).mul_(weight)
    cosines, sines = at.turning(position_embeddings, anew=attention.layer_idx == 0)
    turned_BP1D = at.halves.flip(3).view_as(at.heads)
    heads_BP1D = (at.heads * cosines).addcmul_(turned_BP1D, sines)
    queries, keys = heads_BP1D.split_with_sizes(at.counts, 1)
    if cache is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    if attention.num_key_value_groups == 1:
        seen = F.scaled_dot_product_attention(queries, keys, values, attention_mask, scale=attention.scaling)
    else:
        seen, _ = sdpa_attention_forward(attention, queries, keys, values, attention_mask, scaling=attention.scaling)
    return _multiply(seen.reshape(len(tokens_BH), -1), weights.output)


def add_normed(residual_BH: torch.Tensor, output_BH: torch.Tensor, norm: Any, weight_H: torch.Tensor) -> torch.Tensor:
    """Return ``residual + norm(output)``, ``(B, H)``."""
    if len(output_BH) == 1:
        return torch.addcmul(residual_BH, output_BH, weight_H, value=_scale(output_BH, norm.variance_epsilon))
    return torch.addcmul(residual_BH, output_BH * scale_rows(output_BH, norm.variance_epsilon), weight_H)


class _Memory(threading.local):
    """What is written into for every token, cut into views; each thread has its own.

    Attributes:
        queries: ``(B, G * D)``.
        keys: ``(B, J * D)``, right after the queries.
        heads: Both, ``(B, P, 1, D)``.
        halves: Both, ``(B, P, 1, 2, D / 2)``.
        counts: G and J.
    """

    def __init__(self) -> None:
        self.shape: Any = None
        self.cosines: torch.Tensor | None = None
        self.sines: torch.Tensor | None = None

    def take(self, tokens_BH: torch.Tensor, weights: Weights, width: int) -> "_Memory":
        """Make it fit, and return it."""
        wide, narrow = weights.queries.shape[0], weights.keys.shape[0]
        # Memory from inference mode may only be written there.
        shape = (len(tokens_BH), wide, narrow, width, torch.is_inference_mode_enabled())
        if shape != self.shape:
            # Whatever interrupts what follows leaves nothing that seems to fit.
            self.shape = None
            both = tokens_BH.new_empty((len(tokens_BH), wide + narrow))
            self.queries, self.keys = both[:, :wide], both[:, wide:]
            self.heads = both.view(len(tokens_BH), -1, 1, width)
            self.halves = both.view(len(tokens_BH), -1, 1, 2, width // 2)
            self.counts = [wide // width, narrow // width]
            self.shape = shape
        return self

    def turning(
        self, position_embeddings: tuple[torch.Tensor, torch.Tensor], *, anew: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what heads and heads with exchanged halves are multiplied by, made once for all layers of a token."""
        cosines, sines = position_embeddings
        if anew or sines is not self.sines or cosines is not self.cosines:
            first, second = sines.chunk(2, dim=-1)
            self.signed_sines = torch.cat([-first, second], dim=-1).unsqueeze(1)
            self.wide_cosines = cosines.unsqueeze(1)
            self.cosines, self.sines = cosines, sines
        return self.wide_cosines, self.signed_sines


_MEMORY = _Memory()
# Whatever the default device was when this was imported.
_ZERO = torch.zeros(1, device="cpu", dtype=torch.float32)


def _multiply(rows_BI: torch.Tensor, weight_OI: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    if len(rows_BI) != 1:
        return multiply(rows_BI, weight_OI, out)
    if out is None:
        return torch.mv(weight_OI, rows_BI.view(-1)).unsqueeze(0)
    return torch.mv(weight_OI, rows_BI.view(-1), out=out.view(-1))


def _scale(token_1H: torch.Tensor, epsilon: float) -> float:
    """Return one over the root mean square."""
    token = token_1H.view(-1)
    square = torch.dot(token, token).item() / len(token) + epsilon
    return square**-0.5 if square else float("inf")


def _weight(module: Any, kind: type[nn.Module]) -> torch.Tensor | None:
    weight = plain_weight(module) if type(module) is kind else None
    return weight if weight is not None and weight.dtype == torch.float32 else None


def _forwards() -> tuple[Any, ...]:
    return (
        upstream.FlexOlmoAttention.forward,
        upstream.apply_rotary_pos_emb,
        FlexOlmoRMSNorm.forward,
        FewRowsLinear.forward,
    )


# Some libraries replace what a whole class does.
_FORWARDS = _forwards()
