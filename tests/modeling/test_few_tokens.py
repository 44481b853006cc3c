"""Running experts together on a few tokens changes no result, and whoever put a hook on an expert is still called."""

import pytest
import torch

from flexolmo_hf.modeling import mixture as mixture_file
from flexolmo_hf.modeling.few_tokens import can_run_together, run_together
from tests.modeling.test_expert_sets import named_model

CPU = torch.device("cpu")


def layer(model):
    return list(model.mixtures[0].experts.values())


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 5, 7), (4, 8, 2, 16)])
@torch.no_grad()
def test_each_expert_gives_what_it_gives_alone(counts):
    experts = layer(named_model())
    inputs = [torch.randn(count, 64) for count in counts]
    alone = torch.cat([expert(tokens) for expert, tokens in zip(experts, inputs, strict=True)])

    torch.testing.assert_close(run_together(experts, inputs), alone, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("per_token", [4, 2, 1])
@pytest.mark.parametrize("sets", [None, ["public", "news"], [["public"], ["math", "code", "news"], ["math"]]])
@pytest.mark.parametrize("tokens", [1, 3])
@torch.no_grad()
def test_the_mixture_gives_what_it_gives_one_by_one(monkeypatch, input_ids, per_token, sets, tokens):
    model = named_model(per_token)
    together = model(input_ids[:, :tokens], active_experts=sets).logits
    used = []
    monkeypatch.setattr(mixture_file, "can_run_together", lambda *a: used.append(can_run_together(*a)) and False)
    apart = model(input_ids[:, :tokens], active_experts=sets).logits

    assert any(used)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_expert_that_is_not_plain_is_called_itself(input_ids):
    model, called = named_model(), []
    assert can_run_together(1, CPU, layer(model))
    expert = model.expert_modules("math")[0]
    for module in (expert, expert.up_proj):
        handle = module.register_forward_hook(lambda *_: called.append(1))
        assert not can_run_together(1, CPU, layer(model))
        model(input_ids[:1, :1])
        handle.remove()
    assert called == [1, 1]
    expert.up_proj = torch.nn.Sequential(expert.up_proj)
    assert not can_run_together(1, CPU, layer(model))


def test_experts_run_together_only_on_a_few_tokens_on_a_cpu_without_gradient():
    experts = layer(named_model())
    assert not can_run_together(1, CPU, experts)
    with torch.no_grad():
        assert can_run_together(16, CPU, experts)
        assert not can_run_together(17, CPU, experts)
        assert not can_run_together(1, torch.device("meta"), experts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not can_run_together(1, CPU, experts)
