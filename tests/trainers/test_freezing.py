"""Frozen means: not one bit of anything else moves, under any optimizer."""

import pytest
import torch

from flexolmo_hf import freeze_except, project_biases, unfreeze
from flexolmo_hf.errors import ConfigurationError, UnknownExpertError
from tests.modeling.test_expert_sets import named_model

OPTIMIZERS = {
    "adamw with decay": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "sgd with momentum and decay": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def state(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def belongs_to(key, index):
    return f".mlp.experts.{index}." in key


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("per_token", [4, 2], ids=["dense path", "top-k path"])
@pytest.mark.parametrize("expert", ["math", "news"])
def test_two_steps_move_one_expert_its_row_and_its_bias_and_nothing_else(input_ids, optimizer, per_token, expert):
    model = named_model(per_token, router_bias=True)
    for mixture in model.mixtures:
        mixture.gate.bias.data = torch.tensor([0.0, -0.3, -0.2, -0.1])
    before, at = state(model), model.expert_position(expert)
    trained = freeze_except(model, expert)
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        model(input_ids, labels=input_ids).loss.backward()
        steps.step()
        steps.zero_grad()
    after = state(model)

    assert len(trained) == 2 * (3 + 2)
    assert len(steps.state) == len(trained)
    assert after.keys() == before.keys()
    for key in before:
        if belongs_to(key, at):
            assert not torch.equal(after[key], before[key]), key
        elif ".mlp.gate." in key:
            rows = [row for row in range(4) if row != at]
            assert torch.equal(after[key][rows], before[key][rows]), key
            assert not torch.equal(after[key][at], before[key][at]), key
        else:
            assert torch.equal(after[key], before[key]), key


def test_the_router_can_be_left_out(input_ids):
    model = named_model()

    assert not any(".gate." in name for name in freeze_except(model, "math", train_router=False))


def test_unfreezing_gives_an_ordinary_model_with_the_trained_row_in_its_place():
    model = named_model()
    freeze_except(model, "math")
    for mixture in model.mixtures:
        mixture.gate.trained_row.data.fill_(0.25)
    unfreeze(model)

    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("trained" in name for name, _ in model.named_parameters())
    assert all((mixture.gate.weight[1] == 0.25).all() for mixture in model.mixtures)


def test_freezing_twice_keeps_what_was_trained_and_moves_on_to_the_other_expert():
    model = named_model()
    freeze_except(model, "math")
    for mixture in model.mixtures:
        mixture.gate.trained_row.data.fill_(0.25)
    trained = freeze_except(model, "news")

    assert all((mixture.gate.weight[1] == 0.25).all() for mixture in model.mixtures)
    assert not any(belongs_to(name, 1) for name in trained)


def test_a_bias_that_crosses_zero_is_brought_back_and_can_still_move(input_ids):
    model = named_model(router_bias=True)
    freeze_except(model, "math")
    for mixture in model.mixtures:
        mixture.gate.trained_bias.data.fill_(0.5)
    project_biases(model)
    model(input_ids, labels=input_ids).loss.backward()

    for mixture in model.mixtures:
        assert mixture.gate.trained_bias.item() == 0.0
        assert mixture.gate.trained_bias.grad.abs() > 0


def test_in_a_bare_loop_a_bias_that_is_pushed_up_stays_at_zero_and_can_come_down_again(input_ids):
    model = named_model(router_bias=True)
    freeze_except(model, "math")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    biases = [mixture.gate.trained_bias for mixture in model.mixtures]
    for bias in biases:
        bias.data.fill_(0.0)
    for direction in (-1, -1, 1, 1):
        logits = model(input_ids, output_router_logits=True).router_logits
        (direction * sum(layer[:, 1].mean() for layer in logits)).backward()
        assert all(bias.grad.abs() > 0 for bias in biases)
        optimizer.step()
        optimizer.zero_grad()
        project_biases(model)
        assert all(bias <= 0 for bias in biases)
    assert all(bias < 0 for bias in biases)


def test_what_cannot_be_trained_is_refused():
    model = named_model()
    with pytest.raises(ConfigurationError, match="never trained"):
        freeze_except(model, "public")
    with pytest.raises(UnknownExpertError, match="Did you mean 'math'"):
        freeze_except(model, "maht")
    model.set_active_experts(["public", "code"])
    with pytest.raises(ConfigurationError, match="not in force"):
        freeze_except(model, "math")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_expert_that_cannot_learn_is_refused_and_nothing_is_frozen():
    model = named_model()
    for module in model.expert_modules("math"):
        for projection in (module.gate_proj, module.up_proj, module.down_proj):
            weight = projection.weight.data
            del projection.weight
            projection.register_buffer("weight", weight)
    with pytest.raises(ConfigurationError, match="nothing would be trained"):
        freeze_except(model, "math", train_router=False)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(".gate." in name for name in freeze_except(model, "math"))


def test_quantised_weights_are_refused_and_nothing_is_frozen():
    model = named_model()
    projection = model.expert_modules("math")[1].up_proj
    projection.weight = torch.nn.Parameter(projection.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigurationError, match="'math' is quantised"):
        freeze_except(model, "math")
    assert all(p.requires_grad for p in model.parameters() if p is not projection.weight)
