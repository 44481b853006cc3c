"""Budgets, compared with operations that were counted while tiny models took a step, and with the arithmetic."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM, freeze_all_but_routers
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.budgets import (
    compute_matched,
    data_matched,
    flexolmo_flops,
    router_tuning_flops,
    whole_model_flops,
)
from flexolmo_hf.trainers.plan import Assumptions, ModelSizes, flops_per_token
from tests.conftest import TINY, dense_model

T = 32
OWNERS = {"math": 50_000, "code": 30_000}


def config(experts, **changes):
    return FlexOlmoConfig(**{**TINY, "num_experts": experts, **changes})


def counted(model):
    """Count the operations of one step, by token. The last token predicts nothing, but the head runs on it."""
    model.set_attn_implementation("eager")
    model.train()
    ids = torch.randint(2, TINY["vocab_size"], (1, T))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / T


@pytest.mark.parametrize("experts", [0, 1, 3])
def test_count_of_a_whole_model_is_what_a_step_takes(experts):
    model = FlexOlmoForCausalLM(config(experts)) if experts else dense_model()
    sizes = ModelSizes.of(model.config)
    # Rotary angles are a product too, which the count leaves out.
    angles = 2 * TINY["hidden_size"] // TINY["num_attention_heads"] // 2

    found = whole_model_flops(sizes, experts=experts, sequence=T)
    assert found == pytest.approx(counted(model), abs=2 * angles)


def test_count_of_router_tuning_is_what_a_step_takes_but_for_the_first_layer():
    model = FlexOlmoForCausalLM(config(3))
    freeze_all_but_routers(model)
    sizes = ModelSizes.of(model.config)
    found, real = router_tuning_flops(sizes, experts=3, sequence=T), counted(model)
    first_layer = 2 * (sizes.attention_matrices + 4 * T * sizes.hidden + 3 * (sizes.expert_matrices + sizes.hidden))

    assert real < found <= real + first_layer


def test_a_token_that_uses_fewer_experts_costs_less():
    sizes = ModelSizes.of(config(4))
    two, four = (whole_model_flops(sizes, experts=4, experts_per_token=k, sequence=T) for k in (2, 4))

    assert four - two == 2 * 6 * sizes.layers * 3 * sizes.hidden * sizes.intermediate


@pytest.mark.parametrize("options", [{}, {"experts_per_token": 2}, {"router_tokens": 5000}, {"dense": True}], ids=str)
def test_matched_training_takes_the_operations_of_the_whole_and_not_one_token_more(options):
    options = {"sequence": T, **options}
    tokens = compute_matched(config(3), OWNERS, **options)
    spent = flexolmo_flops(config(3), OWNERS.values(), sequence=T, router_tokens=options.get("router_tokens", 0))
    experts = 0 if options.get("dense") else 3
    cost = whole_model_flops(
        ModelSizes.of(config(3)), experts=experts, experts_per_token=options.get("experts_per_token"), sequence=T
    )

    assert tokens * cost <= spent < (tokens + 1) * cost


def test_an_owner_trains_one_expert_beside_the_public_one_however_many_owners_there_are():
    alone = flops_per_token(ModelSizes.of(config(3)), Assumptions(experts=2, sequence=T, checkpointing=False))

    assert flexolmo_flops(config(3), OWNERS.values(), sequence=T) == pytest.approx(80_000 * alone)


def test_router_tuning_counts_the_public_expert_beside_the_owners():
    plain, tuned = (flexolmo_flops(config(3), OWNERS.values(), sequence=T, router_tokens=n) for n in (0, 1000))
    tuning = router_tuning_flops(ModelSizes.of(config(3)), experts=3, sequence=T)

    assert tuned - plain == pytest.approx(1000 * tuning)


def test_with_all_experts_active_the_same_operations_are_fewer_tokens():
    assert compute_matched(config(3), OWNERS, sequence=T) < data_matched(OWNERS)
    assert compute_matched(config(3), OWNERS, sequence=T, dense=True) > compute_matched(config(3), OWNERS, sequence=T)


def test_the_same_data_is_what_owners_and_router_saw():
    assert data_matched(OWNERS, router_tokens=7, public_tokens=5) == 80_012


@pytest.mark.parametrize("owners", [{}, {"math": 0}, {"math": -5}], ids=str)
def test_budgets_of_nothing_are_refused(owners):
    with pytest.raises(ConfigurationError, match="budget"):
        compute_matched(config(3), owners, sequence=T)
    with pytest.raises(ConfigurationError, match="budget"):
        data_matched(owners)
