"""One expert: the feed-forward network of a dense decoder layer."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoMLP

from flexolmo_hf.modeling.configuration import FlexOlmoConfig

# For so many rows the matrix product is faster with the weight on the left, on a CPU in float32: `F.linear` then reads
# the weights at half the speed or less. docs/benchmarks/inference.md has the figures.
_FEW_ROWS = range(4, 17)


class FewRowsLinear(nn.Linear):
    """Differs from `nn.Linear` only in how a CPU multiplies a few rows, as in decoding a small batch."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply, ``(..., in)`` to ``(..., out)``."""
        weight = self.weight
        rows = input.numel() // input.shape[-1] if input.shape[-1] else 0
        if (
            torch.compiler.is_compiling()
            or input.device.type != "cpu"
            or rows not in _FEW_ROWS
            or self.bias is not None
            or torch.is_grad_enabled()
            or type(weight) is not nn.Parameter
            or not weight.dtype == input.dtype == torch.float32
            or torch.is_autocast_enabled("cpu")
        ):
            return F.linear(input, weight, self.bias)
        return (weight @ input.reshape(rows, -1).T).T.reshape(*input.shape[:-1], -1)


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
