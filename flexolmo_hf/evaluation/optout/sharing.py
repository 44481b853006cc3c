"""What all sets of experts have in common on one batch, computed once.

Up to the first mixture nothing depends on the set: the first layer's attention is the same for all sets, and so is what
each of the first layer's experts makes of its output, where every token goes through every expert. From the second
layer on every set has hidden states of its own, and nothing can be shared.

Nor can windows in which an expert is never among a token's best k: the probabilities of the others are those of a
softmax over the set, and change when an expert leaves it, whether or not it was chosen.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from flexolmo_hf.modeling import on_cpu
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.mixture import AUTO, DENSE, FlexOlmoMixture

_VALUES = (bool, int, float, str, type(None))


@contextmanager
def shared_first_layer(model: ExpertSets, tokens: int) -> Iterator[None]:
    """Let calls on one batch share what the first layer computes the same way for all sets; no bit changes.

    Inputs are compared by value, so a call on another batch, also from another thread, gets what it would get
    otherwise. Nothing is kept after the block. Calls with gradient share nothing.

    Args:
        model: A model made of mixtures.
        tokens: Tokens of the batch, padding included.
    """
    first: Any = model.base_model.layers[0]  # type: ignore[attr-defined]
    modules, forwards = [first.self_attn], [first.self_attn.forward]
    # Few tokens of all experts are summed in one piece, which rounds otherwise than one expert after the other.
    if tokens > on_cpu._TOKENS_AT_ONCE and _all_run(model, first.mlp):
        experts = list(first.mlp.experts.values())
        modules += experts
        forwards += _as_the_mixture_runs_them(experts)
    before = [module.__dict__.get("forward") for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        _replace(module, _Once(forward))
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            _replace(module, forward)


def _all_run(model: ExpertSets, mixture: FlexOlmoMixture) -> bool:
    # Where tokens choose, an expert is given other tokens in each set. The other ways of running experts go past the
    # modules, or sum in another order once a module is not plain.
    wanted = mixture.config._experts_implementation or AUTO
    return wanted in (AUTO, DENSE) and mixture.config.num_experts_per_tok >= len(model.active_experts)


def _as_the_mixture_runs_them(experts: list[Any]) -> list[Callable[..., Any]]:
    # A mixture does not call plain experts, and products of many tokens round otherwise than the modules' do.
    weights = on_cpu.untouched_weights(experts)
    if weights is None:
        return [expert.forward for expert in experts]
    return [
        partial(on_cpu.run_alone, of_expert, expert.act_fn, expert.forward)
        for expert, of_expert in zip(experts, weights, strict=True)
    ]


def _replace(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    if forward is None:
        del module.__dict__["forward"]
    else:
        module.__dict__["forward"] = forward


class _Once:
    """A module's forward that returns what it returned last if it is given the same again."""

    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward
        # One attribute, which threads read and replace as a whole.
        self.kept: tuple[list[Any], Any] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        leaves, _ = tree_flatten((args, kwargs))
        # Anything else, such as a cache, may be changed by the call.
        plain = all(isinstance(leaf, (torch.Tensor, *_VALUES)) for leaf in leaves)
        if not plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        kept = self.kept
        if kept is not None and _same(kept[0], leaves):
            return kept[1]
        output = self.forward(*args, **kwargs)
        self.kept = leaves, output
        return output


def _same(ones: list[Any], others: list[Any]) -> bool:
    return len(ones) == len(others) and all(map(_equal, ones, others))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one is other or (one.dtype == other.dtype and one.device == other.device and torch.equal(one, other))
    return type(one) is type(other) and bool(one == other)
