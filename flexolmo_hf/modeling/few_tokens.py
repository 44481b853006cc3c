"""Several experts on a few tokens on a CPU, as in decoding: reading the weights should be all that takes time.

A product with so few rows reads its weights at the speed of memory, so the small steps between the products count.
Here the experts' inner activations are computed in one piece, and no module is called in between. What is computed is
what the experts compute one by one.

Shape letters: H hidden, F feed-forward width, n an expert's tokens, S the tokens of all experts.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from flexolmo_hf.modeling.expert import FewRowsLinear, FlexOlmoExpert, multiply

_MOST_TOKENS = 16


def can_run_together(tokens: int, device: torch.device, experts: Sequence[nn.Module]) -> bool:
    """Tell whether there are few tokens, on a CPU, without gradient, and the experts are plain.

    Args:
        tokens: How many tokens there are.
        device: Where they are.
        experts: The experts; one with hooks, an adapter, or weights of another kind has to be called itself.
    """
    if device.type != "cpu" or tokens > _MOST_TOKENS or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu") and all(_is_plain(expert) for expert in experts)


def run_together(experts: Sequence[Any], inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Run each expert on its tokens.

    Args:
        experts: The experts, for which `can_run_together` holds.
        inputs: Each expert's tokens, ``(n, H)``.

    Returns:
        The outputs, one expert after the other, ``(S, H)``.
    """
    pairs = list(zip(experts, inputs, strict=True))
    gates_SF = torch.cat([multiply(tokens, expert.gate_proj.weight) for expert, tokens in pairs])
    ups_SF = torch.cat([multiply(tokens, expert.up_proj.weight) for expert, tokens in pairs])
    inner_SF = experts[0].act_fn(gates_SF) * ups_SF
    pieces = inner_SF.split([len(tokens) for tokens in inputs])
    return torch.cat([multiply(piece, expert.down_proj.weight) for expert, piece in zip(experts, pieces, strict=True)])


def _is_plain(expert: nn.Module) -> bool:
    return type(expert) is FlexOlmoExpert and _is_untouched(expert) and all(map(_is_plain_linear, expert.linears))


def _is_plain_linear(linear: nn.Module) -> bool:
    return type(linear) is FewRowsLinear and type(linear.weight) is nn.Parameter and _is_untouched(linear)


def _is_untouched(module: nn.Module) -> bool:
    # Libraries put a function of their own in the place of `forward`, or hooks around it.
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
