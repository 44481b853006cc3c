"""Matrix products with few rows on a CPU, as in decoding a small batch: as fast as the weights can be read.

Shape letters: n rows, I input width, O output width, B blocks of it, S columns of a block.
"""

import torch
import torch.nn.functional as F
from torch import nn

# `F.linear` reads a float32 weight at the speed of memory for up to three rows, and at about half of it from four on.
# A batch of products with narrow blocks of the weight reads it a third faster there; with still more rows the weight
# on the left is best. Measured on two cores with AVX-512.
_IN_BLOCKS = range(4, 11)
_WEIGHT_LEFT = range(11, 33)
_BLOCK_WIDTHS = (64, 32, 16, 8)
# A weight of fewer values stays in a core's cache, and is read at any speed.
_SMALL = 2**18


def multiply(rows_nI: torch.Tensor, weight_OI: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply rows by a weight as fast as a CPU can; for inference.

    Args:
        rows_nI: The rows.
        weight_OI: The weight of a linear layer.
        out: Where to write; None for new memory.

    Returns:
        The products, ``(n, O)``.
    """
    count = rows_nI.shape[0]
    if count not in _IN_BLOCKS and count not in _WEIGHT_LEFT:
        return torch.mm(rows_nI, weight_OI.T, out=out)
    if not weight_OI.dtype == rows_nI.dtype == torch.float32 or weight_OI.numel() < _SMALL:
        return torch.mm(rows_nI, weight_OI.T, out=out)
    width = next((width for width in _BLOCK_WIDTHS if weight_OI.shape[0] % width == 0), None)
    if width is None or count in _WEIGHT_LEFT:
        products_nO = (weight_OI @ rows_nI.T).T
        return products_nO if out is None else out.copy_(products_nO)
    blocks = weight_OI.view(-1, width, weight_OI.shape[1])
    products_BnS = torch.bmm(rows_nI.expand(blocks.shape[0], -1, -1), blocks.transpose(1, 2))
    products_nBS = products_BnS.transpose(0, 1)
    if out is None:
        return products_nBS.reshape(count, -1)
    out.unflatten(1, (-1, width)).copy_(products_nBS)
    return out


class FewRowsLinear(nn.Linear):
    """Differs from `nn.Linear` only in how a CPU multiplies a few rows."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Multiply and add the bias, ``(..., I)`` to ``(..., O)``."""
        weight, bias = self.weight, self.bias
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or input.device.type != "cpu":
            return F.linear(input, weight, bias)
        rows = input.numel() // input.shape[-1]
        if rows not in _IN_BLOCKS and rows not in _WEIGHT_LEFT:
            return F.linear(input, weight, bias)
        if type(weight) is not nn.Parameter or torch.is_autocast_enabled("cpu"):
            return F.linear(input, weight, bias)
        products = multiply(input.reshape(rows, -1), weight).view(*input.shape[:-1], -1)
        return products if bias is None else products + bias
