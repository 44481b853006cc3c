"""Rewards train one expert against a reference that is no second model."""

import pytest
import torch
from datasets import Dataset

from flexolmo_hf import ExpertGRPOConfig, ExpertGRPOTrainer
from flexolmo_hf.errors import UnknownExpertError
from flexolmo_hf.trainers.reference import Reference
from tests.trainers.test_freezing import belongs_to, state


def likes_short_words(completions, **kwargs):
    return [float(len(text) % 5) for text in completions]


@pytest.fixture
def grpo(model, tokenizer, tmp_path):
    def make(**changes):
        values = {
            "expert": "math",
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "num_generations": 4,
            "max_completion_length": 6,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "beta": 0.04,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        }
        return ExpertGRPOTrainer(
            model=model,
            reward_funcs=likes_short_words,
            args=ExpertGRPOConfig(**{**values, **changes}),
            train_dataset=Dataset.from_list([{"prompt": f"{n} + 1 ="} for n in range(8)]),
            processing_class=tokenizer,
        )

    return make


@pytest.mark.parametrize("changes", [{}, {"beta": 0.0}, {"reference": "start"}], ids=str)
def test_rewards_move_exactly_one_expert(grpo, model, changes):
    torch.manual_seed(0)
    before = state(model)
    run = grpo(**changes)
    run.train()
    after = state(model)

    assert any(not torch.equal(after[key], before[key]) for key in before if belongs_to(key, 1))
    for key in before:
        if ".mlp.gate." in key:
            assert torch.equal(after[key][0], before[key][0]), key
        elif not belongs_to(key, 1):
            assert torch.equal(after[key], before[key]), key
    assert run.args.beta == run.beta == {**{"beta": 0.04}, **changes}["beta"]
    assert (run.ref_model is None) == (run.beta == 0.0)


def test_the_reference_is_no_second_model(grpo):
    run = grpo(logging_steps=1)
    assert isinstance(run.ref_model, Reference)
    assert not list(run.ref_model.parameters())
    run.train()
    entry = run.state.log_history[0]
    # At the first step the policy is its reference.
    assert entry["kl"] == pytest.approx(0.0, abs=1e-6)
    assert 0 < entry["routing_share"] < 1


def test_an_unknown_expert_is_refused(grpo):
    with pytest.raises(UnknownExpertError):
        grpo(expert="maths")


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_a_resumed_run_keeps_its_reference_if_it_has_one(grpo, beta):
    kept = grpo(beta=beta)._decisive_settings()
    assert ("reference weights" in kept) == bool(beta)
    assert kept["reference"] == ("anchor" if beta else "auto")
    assert {"temperature", "num_generations"} < kept.keys()
