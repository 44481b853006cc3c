"""The gated activation is the plain product, value and gradients, and keeps its two inputs only."""

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from flexolmo_hf.modeling.gated import gated


def pair(dtype=torch.float32):
    return [torch.randn(3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu"])
def test_value_and_gradients_are_those_of_the_plain_product_bit_for_bit(name, dtype):
    activation, (gate, up) = ACT2FN[name], pair(dtype)
    outputs = [gated(activation, gate, up), activation(gate) * up]
    seed = torch.randn_like(outputs[0])
    gradients = [torch.autograd.grad(output, (gate, up), seed) for output in outputs]

    assert torch.equal(*outputs)
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


def test_nothing_but_its_two_inputs_is_kept():
    gate, up = pair()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        gated(nn.SiLU(), gate, up)

    assert {tensor.data_ptr() for tensor in kept} == {gate.data_ptr(), up.data_ptr()}


def test_it_can_be_differentiated_twice_and_mapped_over_samples():
    gate, up = (tensor.double().detach().requires_grad_() for tensor in pair())
    assert torch.autograd.gradgradcheck(lambda *inputs: gated(nn.SiLU(), *inputs), (gate[0, :2, :3], up[0, :2, :3]))

    def gradient(gate, up):
        return torch.func.grad(lambda g: gated(nn.SiLU(), g, up).sum())(gate)

    expected = torch.stack([gradient(one, other) for one, other in zip(gate, up, strict=True)])
    torch.testing.assert_close(torch.func.vmap(gradient)(gate, up), expected)


def test_inputs_of_two_dtypes_keep_theirs_in_the_gradient():
    gate, up = pair()[0], pair(torch.bfloat16)[1]
    gated(nn.SiLU(), gate, up).sum().backward()

    assert (gate.grad.dtype, up.grad.dtype) == (torch.float32, torch.bfloat16)
