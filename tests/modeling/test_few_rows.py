"""Products with few rows are the products they stand for, and only inference takes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from flexolmo_hf.modeling import few_rows
from flexolmo_hf.modeling.few_rows import FewRowsLinear, multiply


@pytest.fixture(params=["small", "large"])
def threshold(request, monkeypatch):
    """Take small weights for large ones, or for what they are."""
    if request.param == "large":
        monkeypatch.setattr(few_rows, "_SMALL", 0)


@pytest.mark.usefixtures("threshold")
@pytest.mark.parametrize("count", [*range(14), 31, 32, 33, 70])
@pytest.mark.parametrize("outputs", [128, 40, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_a_linear_layer(count, outputs, dtype):
    rows, weight = torch.randn(count, 24, dtype=dtype), torch.randn(outputs, 24, dtype=dtype)
    expected = F.linear(rows, weight)
    exact = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {}

    torch.testing.assert_close(multiply(rows, weight), expected, **exact)
    target = torch.full((count, 2 * outputs), float("nan"), dtype=dtype)
    multiply(rows, weight, out=target[:, :outputs])
    torch.testing.assert_close(target[:, :outputs], expected, **exact)
    assert target[:, outputs:].isnan().all()
    wide = torch.cat([rows, rows], dim=1)[:, :24]
    torch.testing.assert_close(multiply(wide, weight), expected, **exact)


@pytest.mark.parametrize("shape", [(5, 24), (2, 3, 24), (1, 24), (24,), (2, 0, 24), (40, 24)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_the_layer_keeps_leading_dimensions_and_adds_its_bias(monkeypatch, shape, bias):
    monkeypatch.setattr(few_rows, "_SMALL", 0)
    linear, rows = FewRowsLinear(24, 40, bias=bias), torch.randn(shape)
    torch.testing.assert_close(linear(rows), nn.Linear.forward(linear, rows), atol=1e-5, rtol=1e-5)


def test_only_a_plain_weight_without_gradient_takes_the_short_way(monkeypatch):
    taken = []
    monkeypatch.setattr(few_rows, "multiply", lambda rows, weight: taken.append(1) or F.linear(rows, weight))
    linear, rows = FewRowsLinear(24, 40), torch.randn(5, 24)
    linear(rows)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert linear(rows).dtype == torch.bfloat16
        linear(rows[:3])
        linear.to("meta")(rows.to("meta"))
        assert not taken
        FewRowsLinear(24, 40)(rows)
        assert taken


def test_gradient_flows_through_few_rows():
    linear, rows = FewRowsLinear(24, 40), torch.randn(5, 24, requires_grad=True)
    linear(rows).sum().backward()
    assert rows.grad is not None
    assert linear.weight.grad is not None
