"""What weighs the members is computed by hand: which logits predict a token, what it was given, and what follows."""

import math

import pytest
import torch

from flexolmo_hf.evaluation.baselines.member_weights import log_weights, predicted_by, token_log_likelihood


def test_a_token_is_predicted_by_the_last_real_column_before_it():
    real = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 1, 1]]).bool()

    assert predicted_by(real).tolist() == [[-1, 0, 1, 2, 3], [-1, -1, -1, 2, 3], [-1, 0, 1, 2, 2], [-1, 0, 0, 0, 3]]


def test_a_token_is_given_what_the_column_that_predicts_it_says():
    logits = torch.tensor([[[1.0, 2.0, 4.0], [0.0, 3.0, 1.0], [5.0, 1.0, 0.0]]])
    found = token_log_likelihood(logits, logits.logsumexp(-1), torch.tensor([[2, 1, 0]]), torch.tensor([[-1, 0, 1]]))

    second = 2 - math.log(math.e + math.e**2 + math.e**4)
    third = 0 - math.log(1 + math.e**3 + math.e)
    assert found[0, 1:].tolist() == pytest.approx([second, third], rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "sum"}, [math.exp(-2), math.exp(-4), math.exp(-6)]),
        ({"loss": "mean"}, [math.exp(-1), math.exp(-2), math.exp(-3)]),
        ({"loss": "mean", "temperature": 0.5}, [math.exp(-2), math.exp(-4), math.exp(-6)]),
        ({"loss": "sum", "top_k": 2}, [math.exp(-2), math.exp(-4), 0]),
        ({"loss": "sum", "top_k": 1}, [1, 0, 0]),
    ],
    ids=str,
)
def test_weights_are_the_softmax_over_the_best_members_losses(settings, expected):
    settings = {"temperature": 1.0, "top_k": None, **settings}
    likelihood = torch.tensor([[[-2.0, -4.0, -6.0]] * 2])
    weights = log_weights(likelihood, torch.tensor([[2, 0]]), **settings).exp()[0]

    assert weights[0].tolist() == pytest.approx([value / sum(expected) for value in expected])
    # Nothing has been scored.
    assert weights[1].tolist() == pytest.approx([1 / 3] * 3)
