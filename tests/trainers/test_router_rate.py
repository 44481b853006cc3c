"""Router row and bias move at their own rate, and everything else as before."""

import pytest
import torch

from flexolmo_hf import freeze_except
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.router_rate import scale_router_rate
from tests.modeling.test_expert_sets import named_model
from tests.trainers.conftest import TEXT


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
def test_the_router_moves_at_its_own_rate(scale):
    model = named_model(router_bias=True)
    freeze_except(model, "math")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scale_router_rate(optimizer, model, scale)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            expected = before[name] - 0.1 * (scale if ".gate." in name else 1)
            torch.testing.assert_close(parameter.detach(), expected)


def test_the_trainer_schedules_both_rates(trainer, model):
    run = trainer(TEXT, router_lr_scale=0.25, max_steps=4, lr_scheduler_type="linear")
    run.train()
    rates = {id(p): group["initial_lr"] for group in run.optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert rates[id(parameter)] == pytest.approx(1e-2 * (0.25 if ".gate." in name else 1))
    decays = {id(p): group["weight_decay"] for group in run.optimizer.param_groups for p in group["params"]}
    assert set(decays.values()) == {0.1, 0.0} or set(decays.values()) == {0.1}
    assert run.training_record()["router learning rate scale"] == 0.25


def test_a_negative_rate_is_refused(settings):
    with pytest.raises(ConfigurationError, match="router_lr_scale is -1"):
        settings(router_lr_scale=-1.0)
