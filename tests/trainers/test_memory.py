"""Training never makes the logits of a whole batch, and keeps no more than the experts' inputs to the backward pass."""

import pytest
import torch

from benchmarks.training.memory import LargestTensor
from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM, freeze_except
from tests.trainers.conftest import TEXT

#: That of the released checkpoints.
VOCABULARY, HIDDEN, ROWS = 100_352, 8, 4


@pytest.fixture
def wide():
    """A model so narrow that its head is smaller than the logits of a batch."""
    config = FlexOlmoConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_experts=2,
        pad_token_id=0,
        eos_token_id=1,
        expert_names=["public", "math"],
    )
    return FlexOlmoForCausalLM(config)


def logits_of(batch):
    return (batch["labels"][:, 1:]).numel() * VOCABULARY


def test_a_step_of_the_trainer_never_makes_all_logits(trainer, wide):
    run = trainer(TEXT, using=wide, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    assert wide.lm_head.weight.numel() < logits_of(batch)
    with LargestTensor() as largest:
        run.train()

    assert largest.elements < logits_of(batch)


def test_the_models_own_loss_does(trainer, wide):
    batch = next(iter(trainer(TEXT, using=wide).get_train_dataloader()))
    with LargestTensor() as largest:
        wide(**batch, use_cache=False).loss.backward()

    assert largest.elements >= logits_of(batch)


def test_an_expert_keeps_two_inner_activations_and_the_trained_one_their_product_too(model):
    freeze_except(model, "math")
    kept = {}
    for index, expert in model.mixtures[0].experts.items():
        sizes = kept[index] = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.shape[-1]
            return tensor

        hidden = torch.randn(2, 5, model.config.hidden_size, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            expert(hidden)
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        kept[index] = [size for place, size in sizes.items() if place not in weights]

    assert sorted(kept["0"]) == [model.config.intermediate_size] * 2
    assert sorted(kept["1"]) == sorted([model.config.intermediate_size] * 3 + [model.config.hidden_size])
