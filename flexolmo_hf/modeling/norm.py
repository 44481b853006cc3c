"""The root mean square norm on a CPU, in fewer passes over memory than upstream's.

Upstream's is seven operations, each with memory of its own, and autograd keeps several of them; a model has four norms
in a layer, and on a CPU they took as long as attention's scores. Anything but plain float32 on a CPU runs as upstream.

Shape letters: ... any leading dimensions, H width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

# Up to so many values memory is not what takes time, but the number of operations.
_SMALL = 2**16


class FlexOlmoRMSNorm(upstream.FlexOlmoRMSNorm):
    """Differs from upstream's norm only in speed and memory on a CPU, in training too."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Divide by the root mean square over the last dimension; the shape stays."""
        output: torch.Tensor
        weight = self.weight
        if not _is_plain(hidden_states, weight):
            output = super().forward(hidden_states)
        elif torch.is_grad_enabled() and (hidden_states.requires_grad or weight.requires_grad):
            output, _ = _RMSNorm.apply(hidden_states, weight, self.variance_epsilon)
        elif hidden_states.shape[-2:-1] == (1,):
            output = _of_one_token(hidden_states, weight, self.variance_epsilon)
        elif hidden_states.numel() < _SMALL:
            # To the bit what upstream gives.
            output = F.rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
        else:
            output = (hidden_states * scale_rows(hidden_states, self.variance_epsilon)).mul_(weight)
        return output


def _is_plain(hidden: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        # Parameters that are sharded over processes are of another type.
        and type(weight) is nn.Parameter
        and hidden.device.type == "cpu"
        and hidden.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )


def _of_one_token(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    # In decoding each operation waits for its own code, since the weights have driven all else out of the caches.
    width = hidden.shape[-1]
    # The root of a sum of squares, to which the epsilon belongs: sqrt(H) times the root mean square.
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    length = torch.hypot(length, length.new_full((), (width * epsilon) ** 0.5))
    return (hidden * weight).div_(length).mul_(width**0.5)


def scale_rows(hidden: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return one over the root mean square of the last dimension, ``(..., 1)``."""
    squares = torch.linalg.vecdot(hidden, hidden).unsqueeze(-1)
    return squares.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()


class _RMSNorm(torch.autograd.Function):
    # Per-sample gradients may come by way of vmap.
    generate_vmap_rule = True

    @staticmethod
    def forward(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
        scale = scale_rows(hidden, epsilon)
        return (hidden * scale).mul_(weight), scale

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor, torch.Tensor, float], output: Any) -> None:
        hidden, weight, ctx.epsilon = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(hidden, weight, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        hidden, weight, scale = ctx.saved_tensors
        if torch.is_grad_enabled():
            # A second derivative is wanted, to which the scale is no constant.
            scale = hidden.square().mean(-1, keepdim=True).add(ctx.epsilon).rsqrt()
        of_hidden = of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * (hidden * scale)).flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            weighted = gradient * weight
            # The scale depends on all values of a row, hence the part along the row itself.
            along = torch.linalg.vecdot(weighted, hidden).unsqueeze(-1) * scale.square() / -hidden.shape[-1]
            of_hidden = torch.addcmul(weighted, hidden, along) * scale
        return of_hidden, of_weight, None
