"""Plain experts on a CPU without gradient: what they compute one by one, with less around the products.

With few tokens the products read their weights at the speed of memory, so the small steps between them count: the
experts' inner activations are computed in one piece, and no module is called in between. With one token, as in
decoding, even a view counts, since the weights have driven everything else out of the cores' caches: what is written
into stays from layer to layer, cut into views. With many tokens fresh memory counts, which a CPU maps page by page: the
experts write into the same buffers, one after the other.

Shape letters: N tokens, H hidden, F feed-forward width, S the tokens of all experts, one expert after the other.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation

from flexolmo_hf.modeling.adjacent import join_adjacent
from flexolmo_hf.modeling.expert import FlexOlmoExpert
from flexolmo_hf.modeling.few_rows import FewRowsLinear, multiply
from flexolmo_hf.modeling.untouched import is_untouched, nothing_watches, plain_weight

# So many tokens of all experts are worked on in one piece; more of them do not stay in a core's cache.
_TOKENS_AT_ONCE = 64
# An activation function works on so many bytes at once, and rounds what is left over at a row's end differently.
_BYTES_AT_ONCE = 128


class Weights(NamedTuple):
    """The matrices of one plain expert."""

    gate_FH: torch.Tensor
    up_FH: torch.Tensor
    down_HF: torch.Tensor
    #: ``(2F, H)``, where gate and up lie side by side in memory.
    gate_up: torch.Tensor | None


def plain_weights(experts: Sequence[nn.Module], tokens: torch.Tensor) -> list[Weights] | None:
    """Return the matrices of experts that need not be called themselves.

    Args:
        experts: The experts.
        tokens: What they are to work on.

    Returns:
        Nothing where there is no CPU, or gradient, autocast or a compiler, where the tokens have no values or several,
        and where an expert has a hook, an adapter, or weights of another kind.
    """
    if not nothing_watches(tokens) or _forwards() != _FORWARDS:
        return None
    return untouched_weights(experts)


def untouched_weights(experts: Sequence[nn.Module]) -> list[Weights] | None:
    """Return the matrices of experts none of which has a hook, an adapter, or weights of another kind; else None."""
    first = experts[0].__dict__["_modules"].get("act_fn") if experts else None
    weights = [_weights_of(expert, first) for expert in experts]
    return None if None in weights else weights  # type: ignore[return-value]


def run_alone(weights: Weights, activation: Any, forward: Callable[..., Any], hidden: torch.Tensor) -> torch.Tensor:
    """Run one expert to the bit as `mix` does that has many tokens.

    Args:
        weights: From `untouched_weights`.
        activation: The expert's activation function.
        forward: What runs the expert where `mix` would call it itself.
        hidden: What it works on, ``(..., H)``.
    """
    tokens_NH = hidden.reshape(-1, hidden.shape[-1])
    if len(tokens_NH) <= _TOKENS_AT_ONCE or not nothing_watches(hidden) or _forwards() != _FORWARDS:
        output: torch.Tensor = forward(hidden)
        return output
    buffers = _Buffers(tokens_NH, weights, len(tokens_NH))
    return _run(buffers, [tokens_NH], [weights], activation).view_as(hidden)


def mix(
    tokens_NH: torch.Tensor,
    weights: Sequence[Weights],
    activation: Any,
    counts: Sequence[int],
    positions_S: torch.Tensor | None,
    shares_S1: torch.Tensor,
) -> torch.Tensor:
    """Run each expert on its tokens, and sum each token's outputs by their weights.

    Args:
        tokens_NH: The tokens.
        weights: The experts' matrices, from `plain_weights`.
        activation: The experts' activation function.
        counts: How many tokens each expert works on.
        positions_S: Which tokens, expert by expert; None if each expert works on all of them.
        shares_S1: The routing weight of each.

    Returns:
        The mixture's output, ``(N, H)``; zero where a token has no expert.
    """
    if positions_S is None and len(tokens_NH) == 1:
        return mix_for_one(tokens_NH[0], weights, activation, shares_S1.squeeze(1)).unsqueeze(0)
    if positions_S is None and sum(counts) <= _TOKENS_AT_ONCE:
        outputs = _run(_Buffers(tokens_NH, weights[0], sum(counts)), [tokens_NH] * len(weights), weights, activation)
        return outputs.mul_(shares_S1).view(len(weights), *tokens_NH.shape).sum(0)
    mixed = torch.zeros_like(tokens_NH)
    groups = list(_groups(counts))
    buffers = _Buffers(tokens_NH, weights[0], max((sum(counts[group]) for group in groups), default=0))
    start = 0
    for group in groups:
        stop = start + sum(counts[group])
        shares = shares_S1[start:stop]
        if positions_S is None:
            outputs = _run(buffers, [tokens_NH] * len(counts[group]), weights[group], activation)
            for of_expert in outputs.mul_(shares).split(counts[group]):
                mixed.add_(of_expert)
        else:
            here = positions_S[start:stop]
            pieces = tokens_NH.index_select(0, here).split(counts[group])
            mixed.index_add_(0, here, _run(buffers, pieces, weights[group], activation).mul_(shares))
        start = stop
    return mixed


def mix_for_one(
    token_H: torch.Tensor, weights: Sequence[Weights], activation: Any, shares_K: torch.Tensor
) -> torch.Tensor:
    """Run each expert on one token, and sum its outputs by their weights.

    Args:
        token_H: The token.
        weights: The experts' matrices, from `plain_weights`.
        activation: The experts' activation function.
        shares_K: The routing weight of each.

    Returns:
        The mixture's output, ``(H,)``.
    """
    at = _ONE_TOKEN.take(token_H, weights)
    for of_expert, both, gates, ups in zip(weights, at.gates_ups, at.gates, at.ups, strict=True):
        if both is not None and of_expert.gate_up is not None:
            torch.mv(of_expert.gate_up, token_H, out=both)
        else:
            torch.mv(of_expert.gate_FH, token_H, out=gates)
            torch.mv(of_expert.up_FH, token_H, out=ups)
    _activate(activation, at.all_gates, at.all_ups)
    for of_expert, inner, outputs in zip(weights, at.gates, at.outputs, strict=True):
        torch.mv(of_expert.down_HF, inner, out=outputs)
    return torch.mv(at.all_outputs_HK, shares_K)


class _Buffers:
    """Memory that one group of experts after the other writes into.

    Attributes:
        flat: All of what follows but the outputs, for another order.
        gates_ups_S2F: Gates and ups side by side, as one product writes them; None where the width would let the
            activation function round differently than in memory of its own.
        gates_SF: The gates.
        ups_SF: The ups.
        outputs_SH: The outputs.
    """

    def __init__(self, tokens_NH: torch.Tensor, weights: Weights, size: int):
        width, hidden = weights.gate_FH.shape
        self.gates_ups_S2F: torch.Tensor | None = None
        self.flat = tokens_NH.new_empty(2 * size * width)
        if width * tokens_NH.element_size() % _BYTES_AT_ONCE == 0:
            self.gates_ups_S2F = self.flat.view(size, 2 * width)
            self.gates_SF, self.ups_SF = self.gates_ups_S2F[:, :width], self.gates_ups_S2F[:, width:]
        else:
            self.gates_SF, self.ups_SF = self.flat.view(2, size, width)
        self.outputs_SH = tokens_NH.new_empty((size, hidden))


class _OneToken(threading.local):
    """What the experts of a layer write into when one token is decoded, for as long as their shape does not change.

    Every thread has its own, since a model may be run by several.
    """

    def __init__(self) -> None:
        self.shape: Any = None

    def take(self, token_H: torch.Tensor, weights: Sequence[Weights]) -> "_OneToken":
        """Make the buffers fit, and return them."""
        # Memory from inference mode may only be written there.
        shape = (len(weights), weights[0].gate_FH.shape, token_H.dtype, torch.is_inference_mode_enabled())
        if shape != self.shape:
            # Whatever interrupts what follows leaves nothing that seems to fit.
            self.shape = None
            buffers = _Buffers(token_H.unsqueeze(0), weights[0], len(weights))
            both = buffers.gates_ups_S2F
            self.gates_ups = [None] * len(weights) if both is None else list(both)
            self.all_gates, self.all_ups, self.all_outputs = buffers.gates_SF, buffers.ups_SF, buffers.outputs_SH
            self.all_outputs_HK = self.all_outputs.T
            self.gates, self.ups, self.outputs = list(self.all_gates), list(self.all_ups), list(self.all_outputs)
            self.shape = shape
        return self


_ONE_TOKEN = _OneToken()


def _run(
    buffers: _Buffers, pieces: Sequence[torch.Tensor], weights: Sequence[Weights], activation: Any
) -> torch.Tensor:
    counts = [piece.shape[0] for piece in pieces]
    total = sum(counts)
    outputs_SH = buffers.outputs_SH[:total]
    # Other activation functions may look at a token's neurons side by side.
    if len(pieces) == 1 and total > _TOKENS_AT_ONCE and isinstance(activation, nn.SiLU | SiLUActivation):
        _run_on_columns(buffers, pieces[0], weights[0], activation, outputs_SH)
        return outputs_SH
    gates_SF, ups_SF = buffers.gates_SF[:total], buffers.ups_SF[:total]
    if buffers.gates_ups_S2F is not None and all(of_expert.gate_up is not None for of_expert in weights):
        targets = buffers.gates_ups_S2F[:total].split_with_sizes(counts)
        for piece, of_expert, both in zip(pieces, weights, targets, strict=True):
            multiply(piece, of_expert.gate_up, out=both)  # type: ignore[arg-type]
    else:
        gates_of, ups_of = gates_SF.split_with_sizes(counts), ups_SF.split_with_sizes(counts)
        for piece, of_expert, gates, ups in zip(pieces, weights, gates_of, ups_of, strict=True):
            multiply(piece, of_expert.gate_FH, out=gates)
            multiply(piece, of_expert.up_FH, out=ups)
    inner_SF = _activate(activation, gates_SF, ups_SF)
    inner_of, outputs_of = inner_SF.split_with_sizes(counts), outputs_SH.split_with_sizes(counts)
    for inner, of_expert, outputs in zip(inner_of, weights, outputs_of, strict=True):
        multiply(inner, of_expert.down_HF, out=outputs)
    return outputs_SH


def _run_on_columns(
    buffers: _Buffers, tokens_nH: torch.Tensor, weights: Weights, activation: Any, outputs_nH: torch.Tensor
) -> None:
    # With the weight on the left, gates and ups are columns: such a product takes 4 to 19% less time than with rows, as
    # measured with 96 to 512 tokens, and what lies between the products is in one piece.
    width = weights.gate_FH.shape[0]
    columns_2Fn = buffers.flat[: 2 * width * len(tokens_nH)].view(2 * width, -1)
    gates_Fn, ups_Fn = columns_2Fn[:width], columns_2Fn[width:]
    if weights.gate_up is not None:
        torch.mm(weights.gate_up, tokens_nH.T, out=columns_2Fn)
    else:
        torch.mm(weights.gate_FH, tokens_nH.T, out=gates_Fn)
        torch.mm(weights.up_FH, tokens_nH.T, out=ups_Fn)
    torch.mm(_activate(activation, gates_Fn, ups_Fn).T, weights.down_HF.T, out=outputs_nH)


def _activate(activation: Any, gates_SF: torch.Tensor, ups_SF: torch.Tensor) -> torch.Tensor:
    """Write ``activation(gates) * ups`` over the gates, and return them."""
    if isinstance(activation, nn.SiLU | SiLUActivation):
        return F.silu(gates_SF, inplace=True).mul_(ups_SF)
    return torch.mul(activation(gates_SF), ups_SF, out=gates_SF)


def _groups(counts: Sequence[int]) -> Iterator[slice]:
    """Cut the experts into runs of few tokens each, at least one expert long."""
    start, size = 0, 0
    for index, count in enumerate(counts):
        if size and size + count > _TOKENS_AT_ONCE:
            yield slice(start, index)
            start, size = index, 0
        size += count
    if size:
        yield slice(start, len(counts))


def _weights_of(expert: Any, first: nn.Module | None) -> Weights | None:
    if type(expert) is not FlexOlmoExpert or not is_untouched(expert.__dict__):
        return None
    if not _is_plain_and_like(expert.__dict__["_modules"].get("act_fn"), first):
        return None
    found = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = expert.__dict__["_modules"].get(name)
        weight = plain_weight(linear) if type(linear) is FewRowsLinear else None
        if weight is None:
            return None
        found.append(weight)
    gate, up, down = found
    joined = expert.joined
    if joined is None or not joined.holds(gate, up):
        joined = expert.joined = join_adjacent(gate.data, up.data)
    return Weights(gate, up, down, None if joined is None else joined.both)


def _is_plain_and_like(function: Any, first: Any) -> bool:
    # One of another kind, or with values, settings or hooks of its own, is not that of the first expert.
    if type(function) is not type(first) or not is_untouched(function.__dict__) or function.__dict__["_parameters"]:
        return False
    return (
        function is first or isinstance(function, nn.SiLU | SiLUActivation) or _settings(function) == _settings(first)
    )


def _settings(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name not in _OF_ALL_MODULES}


_OF_ALL_MODULES = set(vars(nn.Module()))


def _forwards() -> tuple[Any, Any]:
    return FlexOlmoExpert.forward, FewRowsLinear.forward


# Some libraries replace what a whole class does.
_FORWARDS = _forwards()
