"""One expert: the feed-forward network of a dense decoder layer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoMLP

from flexolmo_hf.modeling.configuration import FlexOlmoConfig

#: An expert's parameters in one layer, by the names they have in the model and in files.
MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

# For so many rows the matrix product is faster with the weight on the left, on a CPU in float32: `F.linear` then reads
# the weights at half the speed or less. docs/benchmarks/inference.md has the figures.
_FEW_ROWS = range(4, 17)


def multiply(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply ``(..., in)`` by a weight ``(out, in)`` to ``(..., out)`` as fast as a CPU can; for inference."""
    rows = input.numel() // input.shape[-1] if input.shape[-1] else 0
    if rows not in _FEW_ROWS or not weight.dtype == input.dtype == torch.float32:
        return F.linear(input, weight)
    return (weight @ input.reshape(rows, -1).T).T.reshape(*input.shape[:-1], -1)


class FewRowsLinear(nn.Linear):
    """Differs from `nn.Linear` only in how a CPU multiplies a few rows, as in decoding a small batch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply, ``(..., in)`` to ``(..., out)``."""
        weight = self.weight
        if (
            input.device.type != "cpu"
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or self.bias is not None
            or type(weight) is not nn.Parameter
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(input, weight, self.bias)
        return multiply(input, weight)


class FlexOlmoExpert(FlexOlmoMLP):
    """Differs from upstream's feed-forward network in its linear layers' speed on few rows."""

    def __init__(self, config: FlexOlmoConfig):
        # Upstream's constructor would make and fill plain linear layers first.
        nn.Module.__init__(self)
        self.config = config
        self.hidden_size, self.intermediate_size = config.hidden_size, config.intermediate_size
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = FewRowsLinear(hidden, inner, bias=False)
        self.up_proj = FewRowsLinear(hidden, inner, bias=False)
        self.down_proj = FewRowsLinear(inner, hidden, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    @property
    def linears(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        """The three linear layers, or what an adapter has put in their place."""
        return self.gate_proj, self.up_proj, self.down_proj
