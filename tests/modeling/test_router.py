"""Scores follow the paper's formula, and one row can be trained without the others noticing."""

import pytest
import torch

from flexolmo_hf import FlexOlmoConfig
from flexolmo_hf.modeling.router import FlexOlmoRouter
from tests.conftest import TINY


def router(**changes):
    made = FlexOlmoRouter(FlexOlmoConfig(**TINY, num_experts=3, **changes))
    torch.nn.init.normal_(made.weight)
    if made.bias is not None:
        made.bias.data = torch.tensor([0.0, -0.7, 0.4])
    return made


def test_probabilities_follow_the_formula():
    gate, x = router(router_bias=True), torch.randn(2, 5, 64)
    logits, probs = gate(x)
    expected = x @ gate.weight.T + torch.tensor([0.0, -0.7, 0.0])

    torch.testing.assert_close(logits, expected.reshape(10, 3))
    torch.testing.assert_close(probs, expected.softmax(-1))


def test_probabilities_are_computed_in_full_precision():
    _, probs = router().to(torch.bfloat16)(torch.randn(2, 5, 64, dtype=torch.bfloat16))

    assert probs.dtype == torch.float32


def test_a_positive_bias_counts_as_zero():
    gate = router(router_bias=True)

    assert gate.rows()[1].tolist()[2] == 0.0


@pytest.mark.parametrize("router_bias", [False, True])
def test_a_split_row_changes_no_score_and_no_state(router_bias):
    gate, x = router(router_bias=router_bias), torch.randn(2, 5, 64)
    before, state = gate(x)[0], {key: value.clone() for key, value in gate.state_dict().items()}
    gate.split_row(1)

    assert torch.equal(gate(x)[0], before)
    assert gate.state_dict().keys() == state.keys()
    assert all(torch.equal(gate.state_dict()[key], state[key]) for key in state)


@pytest.mark.parametrize("router_bias", [False, True])
def test_a_trained_row_is_seen_in_its_place_by_scores_states_and_the_joined_matrix(router_bias):
    gate, x = router(router_bias=router_bias), torch.randn(2, 5, 64)
    gate.split_row(1)
    gate.trained_row.data.fill_(0.5)
    scores, state = gate(x)[0], {key: value.clone() for key, value in gate.state_dict().items()}
    gate.join_row()

    assert gate.weight[1].tolist() == [0.5] * 64
    assert gate.trained_row is None
    assert torch.equal(gate(x)[0], scores)
    assert all(torch.equal(gate.state_dict()[key], state[key]) for key in state)


@pytest.mark.parametrize("router_bias", [False, True])
def test_a_state_of_joined_matrices_loads_into_a_split_router(router_bias):
    source, target = router(router_bias=router_bias), router(router_bias=router_bias)
    target.split_row(2)
    result = target.load_state_dict(source.state_dict())
    x = torch.randn(2, 5, 64)

    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(target.trained_row, source.weight[2])
    assert torch.equal(target(x)[0], source(x)[0])


def test_a_missing_matrix_is_still_reported_by_a_split_router():
    gate = router()
    gate.split_row(1)

    with pytest.raises(RuntimeError, match="weight"):
        gate.load_state_dict({})


def test_gradient_reaches_the_split_row_alone():
    gate = router(router_bias=True)
    gate.requires_grad_(False)
    gate.split_row(1)
    gate(torch.randn(2, 5, 64))[1][..., 1].sum().backward()

    assert gate.weight.grad is None
    assert gate.trained_row.grad.abs().sum() > 0
    assert gate.trained_bias.grad.abs().sum() > 0
