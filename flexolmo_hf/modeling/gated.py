"""The gated activation of an expert, ``silu(gate) * up``, keeping less for the backward pass.

Autograd would keep the gate, its activation and the up projection. The activation follows from the gate, so it is
computed again: for each expert a third less to keep, at the price of one pass over memory.

Shape letters: ... any leading dimensions, F feed-forward width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import SiLUActivation


def gated(activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``activation(gate) * up``, ``(..., F)``; value and gradients are those of just that, bit for bit.

    Args:
        activation: The activation function.
        gate: Output of the gate projection, ``(..., F)``.
        up: Output of the up projection, ``(..., F)``.
    """
    silu = isinstance(activation, nn.SiLU | SiLUActivation)
    # A compiler decides by itself what to compute again.
    if not silu or not torch.is_grad_enabled() or gate.dtype != up.dtype or torch.compiler.is_compiling():
        product: torch.Tensor = activation(gate) * up
        return product
    kept: torch.Tensor = _GatedSiLU.apply(gate, up)
    return kept


class _GatedSiLU(torch.autograd.Function):
    # Per-sample gradients may come by way of vmap.
    generate_vmap_rule = True

    @staticmethod
    def forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return F.silu(gate) * up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return _silu_backward(gradient * up, gate), gradient * F.silu(gate)


def _silu_backward(gradient: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    if torch.is_grad_enabled():
        # A second derivative is wanted, which torch's kernel does not have.
        sigmoid = gate.sigmoid()
        return gradient * sigmoid * (1 + gate * (1 - sigmoid))
    found: torch.Tensor = torch.ops.aten.silu_backward(gradient, gate)
    return found
