"""The norm computes what upstream's computes, values and gradients, and keeps less."""

import pytest
import torch
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm


def pair(width=128, eps=1e-6, dtype=torch.float32):
    ours, theirs = (kind(width, eps=eps).to(dtype) for kind in (FlexOlmoRMSNorm, upstream.FlexOlmoRMSNorm))
    values = torch.rand(width) + 0.1
    ours.weight.data.copy_(values)
    theirs.weight.data.copy_(values)
    return ours, theirs


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_the_norm_is_upstreams(tokens, dtype, eps):
    ours, theirs = pair(eps=eps, dtype=dtype)
    hidden = torch.randn(2, tokens, 128, dtype=dtype) * 3
    kept = hidden.clone()
    near = {"atol": 0, "rtol": 0} if dtype == torch.bfloat16 else {"atol": 2e-6, "rtol": 2e-6}
    torch.testing.assert_close(ours(hidden), theirs(hidden), **near)
    with torch.no_grad():
        torch.testing.assert_close(ours(hidden), theirs(hidden), **near)
    assert torch.equal(hidden, kept)


@pytest.mark.parametrize("trained", ["hidden", "weight", "both"])
def test_gradients_are_upstreams(trained):
    found = []
    seed = torch.randn(2, 5, 128)
    hidden = torch.randn(2, 5, 128) * 3
    for norm in pair(eps=0.1):
        given = hidden.clone().requires_grad_(trained != "weight")
        norm.weight.requires_grad_(trained != "hidden")
        norm(given).backward(seed)
        found.append((given.grad, norm.weight.grad))

    assert [gradient is None for gradient in found[0]] == [trained == "weight", trained == "hidden"]
    for ours, theirs in zip(*found, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=2e-5)


def test_it_can_be_differentiated_twice_and_mapped_over_samples():
    ours, theirs = pair(width=4, eps=0.1)
    hidden, direction = torch.randn(3, 4), torch.randn(3, 4)

    def second(norm):
        given = hidden.clone().requires_grad_()
        (first,) = torch.autograd.grad(norm(given).pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad((first * direction).sum(), [given, norm.weight])

    for found, expected in zip(second(ours), second(theirs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

    def gradient(one):
        return torch.func.grad(lambda given: ours(given).pow(3).sum())(one)

    torch.testing.assert_close(torch.func.vmap(gradient)(hidden), torch.stack([gradient(one) for one in hidden]))


def test_nothing_but_its_input_and_the_scale_is_kept_where_the_weight_is_frozen():
    ours, _ = pair()
    ours.weight.requires_grad_(False)
    hidden, sizes = torch.randn(2, 5, 128, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        ours(hidden)

    assert sorted(sizes) == [2 * 5, 128, 2 * 5 * 128]


@pytest.mark.parametrize("tokens", [1, 700])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_hidden_states_of_another_dtype_than_the_weight_run_upstreams(tokens, dtypes):
    ours, theirs = pair(dtype=dtypes[1])
    hidden = torch.randn(2, tokens, 128, dtype=dtypes[0])
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(ours(hidden), theirs(hidden))


def test_autocast_runs_upstreams():
    ours, theirs = pair()
    hidden = torch.randn(2, 5, 128, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(hidden), theirs(hidden))
