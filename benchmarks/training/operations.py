"""How many floating-point operations a step must do, and how fast this machine does its products alone.

Shape letters: N tokens of a step, H hidden, F feed-forward width, V vocabulary.
"""

import time
from collections import Counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.inference.settings import Shape
from flexolmo_hf.trainers.plan import Assumptions, ModelSizes, flops_per_token

#: Rows, summed-over width, columns, and how the operands lie in memory: ``"forward"`` multiplies by a weight's
#: transpose, ``"input"`` by the weight, ``"weight"`` gradients by a transposed gradient's columns.
Product = tuple[int, int, int, str]


def planned(shape: Shape, tokens: int, length: int) -> float:
    """Return the operations of a step that trains one expert, by the package's own plan.

    Args:
        shape: The model.
        tokens: Tokens of the step.
        length: Tokens of a sequence.
    """
    assumptions = Assumptions(gpus=1, experts=shape.experts, sequence=length, checkpointing=False)
    return tokens * flops_per_token(_sizes(shape), assumptions)


def counted(model: Any, ids_BT: torch.Tensor) -> float:
    """Return the operations that torch counts in a real step, its optimizer left out.

    The counter does not know the CPU's fused attention, so attention is run in its parts meanwhile.
    """
    fused = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(ids_BT, labels=ids_BT, use_cache=False).loss.backward()
    model.zero_grad(set_to_none=True)
    model.set_attn_implementation(fused)
    return float(counter.get_total_flops())


def products(shape: Shape, tokens: int) -> Counter[Product]:
    """Return the products with weights of a step that trains one of two experts, and how often each is done."""
    attention = Counter(_pair(tokens, shape.hidden, shape.hidden, 4))
    inner = Counter(_pair(tokens, shape.hidden, shape.inner, 2))
    outer = Counter(_pair(tokens, shape.inner, shape.hidden, 1))
    experts = Counter({product: shape.experts * count for product, count in (inner + outer).items()})
    found: Counter[Product] = Counter()
    for layer in range(shape.layers):
        for product, count in (attention + experts).items():
            if layer or product[3] == "forward":
                found[product] += count
    # Below the first layer's mixture nothing is trained: there the gradient ends at the trained expert's inner
    # activations.
    found[(tokens, shape.hidden, shape.inner, "input")] += 1
    found[(shape.inner, tokens, shape.hidden, "weight")] += 2 * shape.layers
    found[(shape.hidden, tokens, shape.inner, "weight")] += shape.layers
    found.update(_pair(tokens, shape.hidden, shape.vocabulary, 1))
    return found


def operations(found: Counter[Product]) -> float:
    """Return the floating-point operations of products."""
    return float(sum(2 * rows * width * columns * count for (rows, width, columns, _), count in found.items()))


class Products:
    """The products of a step, ready to be done and nothing else.

    Args:
        found: What to do, from `products`.
    """

    def __init__(self, found: Counter[Product]):
        self.found = found
        # Ones and not nothing: memory that was never written is one page, read over and over.
        self._operands = {product: _operands(product) for product in found}

    def run(self) -> float:
        """Do each product as often as a step does, into memory that is there already, and return the seconds."""
        begin = time.perf_counter()
        for product, count in self.found.items():
            left, right, out = self._operands[product]
            for _ in range(count):
                torch.mm(left, right, out=out)
        return time.perf_counter() - begin


def _pair(tokens: int, inputs: int, outputs: int, count: int) -> dict[Product, int]:
    return {(tokens, inputs, outputs, "forward"): count, (tokens, outputs, inputs, "input"): count}


def _operands(product: Product) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, width, columns, kind = product
    out = torch.ones(rows, columns)
    if kind == "forward":
        return torch.ones(rows, width), torch.ones(columns, width).T, out
    if kind == "input":
        return torch.ones(rows, width), torch.ones(width, columns), out
    return torch.ones(width, rows).T, torch.ones(width, columns), out


def _sizes(shape: Shape) -> ModelSizes:
    return ModelSizes(
        hidden=shape.hidden,
        intermediate=shape.inner,
        layers=shape.layers,
        heads=shape.heads,
        key_value_heads=shape.heads,
        vocabulary=shape.vocabulary,
    )
