"""The z-losses equal their definitions, computed from full logits."""

import pytest
import torch
from torch import nn

from flexolmo_hf.trainers.losses import lm_z_squares, router_z_loss


def test_the_router_z_loss_is_the_mean_squared_log_normaliser():
    logits = [torch.randn(6, 3), torch.randn(6, 3)]
    expected = torch.cat(logits).exp().sum(-1).log().square().mean()

    torch.testing.assert_close(router_z_loss(logits), expected)


def test_padding_does_not_count_in_the_router_z_loss():
    logits, mask = [torch.randn(6, 3), torch.randn(6, 3)], torch.tensor([[0, 1, 1], [1, 1, 0]])
    kept = [layer[mask.flatten().bool()] for layer in logits]

    torch.testing.assert_close(router_z_loss(logits, mask), router_z_loss(kept))


@pytest.mark.parametrize("of", ["value", "gradient"])
def test_the_output_z_loss_needs_no_logits(of):
    head, labels = nn.Linear(8, 11, bias=False), torch.tensor([[3, -100, 5], [0, 10, -100]])
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    logits = head(hidden)
    log_probs = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels != -100)
    expected = logits.logsumexp(-1).square() * (labels != -100)
    found = lm_z_squares(hidden, head, labels, log_probs)

    if of == "value":
        torch.testing.assert_close(found, expected)
    else:
        gradients = [torch.autograd.grad(squares.sum(), hidden, retain_graph=True)[0] for squares in (found, expected)]
        torch.testing.assert_close(*gradients)
