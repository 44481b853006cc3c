"""Preferences train one expert against a reference that is no second model."""

import pytest
import torch
from datasets import Dataset

from flexolmo_hf import ExpertDPOConfig, ExpertDPOTrainer, FlexOlmoForCausalLM, freeze_except, to_low_rank
from flexolmo_hf.errors import ConfigurationError, ResumeMismatchError, UnknownExpertError
from flexolmo_hf.trainers.reference import Reference, starts_as_the_anchor
from tests.trainers.test_freezing import belongs_to, state

PAIRS = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": f" {n}"} for n in range(16)]


@pytest.fixture
def dpo(model, tokenizer, tmp_path):
    def make(using=None, *, eval_rows=None, **changes):
        values = {
            "expert": "math",
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "max_length": 32,
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
        }
        return ExpertDPOTrainer(
            model=model if using is None else using,
            args=ExpertDPOConfig(**{**values, **changes}),
            train_dataset=Dataset.from_list(PAIRS),
            eval_dataset=None if eval_rows is None else Dataset.from_list(eval_rows),
            processing_class=tokenizer,
        )

    return make


@pytest.mark.parametrize("changes", [{}, {"reference": "start"}, {"precompute_ref_log_probs": True}], ids=str)
def test_preferences_move_exactly_one_expert(dpo, model, changes):
    before = state(model)
    run = dpo(**changes)
    run.train()
    after = state(model)

    for key in before:
        if belongs_to(key, 1):
            assert not torch.equal(after[key], before[key]), key
        elif ".mlp.gate." in key:
            assert torch.equal(after[key][0], before[key][0]), key
        else:
            assert torch.equal(after[key], before[key]), key
    assert run.ref_model is run._reference
    assert not list(run.ref_model.parameters())


@pytest.mark.parametrize("reference", ["anchor", "start", "auto"])
def test_at_the_start_policy_and_reference_agree_so_the_loss_is_log_two(dpo, reference):
    run = dpo(reference=reference, router_z_loss_coef=0.0, max_steps=1, logging_steps=1)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def moved(model):
    for module in model.expert_modules("math"):
        for parameter in module.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def test_a_resumed_run_keeps_its_reference(dpo, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    dpo(**saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    taken = FlexOlmoForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ResumeMismatchError, match="reference was 'anchor' and is 'start'"):
        dpo(using=taken, **saving).train(resume_from_checkpoint=str(checkpoint))
    dpo(using=taken, reference="anchor", **saving).train(resume_from_checkpoint=str(checkpoint))


def test_a_resumed_run_keeps_the_start_it_is_held_against(dpo, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "reference": "start"}
    dpo(**saving).train()
    checkpoint = tmp_path / "run" / "checkpoint-1"
    taken = FlexOlmoForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ResumeMismatchError, match="reference weights was"):
        dpo(using=taken, **saving).train(resume_from_checkpoint=str(checkpoint))


@torch.no_grad()
def test_the_anchor_is_the_model_without_the_expert(model, input_ids):
    moved(model)
    freeze_except(model, "math")
    reference = Reference(model, "math", "anchor")
    found = reference(input_ids).logits
    assert torch.equal(found, model(input_ids, active_experts=["public"]).logits)
    assert model.active_experts == ["public", "math"]


@torch.no_grad()
def test_the_start_is_the_model_as_it_was(model, input_ids):
    moved(model)
    freeze_except(model, "math")
    reference = Reference(model, "math")
    assert reference.kind == "start"
    was = model(input_ids).logits
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1
    now = model(input_ids).logits
    assert torch.equal(reference(input_ids).logits, was)
    assert torch.equal(model(input_ids).logits, now)
    assert not torch.equal(was, now)
    with pytest.raises(KeyError), reference.in_force():
        raise KeyError
    assert torch.equal(model(input_ids).logits, now)


def test_the_reference_is_the_anchor_only_where_both_are_one_function(model):
    assert starts_as_the_anchor(model, "math")
    model.config.num_experts_per_tok = 1
    assert not starts_as_the_anchor(model, "math")
    model.config.num_experts_per_tok = 2
    assert not starts_as_the_anchor(moved(model), "math")


def test_a_fresh_low_rank_expert_starts_as_the_anchor(model):
    to_low_rank(model, "math", 2)
    assert starts_as_the_anchor(model, "math")
    model.expert_modules("math")[1].up_proj.B.weight.data[0, 0] = 1
    assert not starts_as_the_anchor(model, "math")


def test_what_cannot_be_meant_is_refused(dpo, model, tokenizer):
    with pytest.raises(UnknownExpertError):
        dpo(expert="maths")
    with pytest.raises(ConfigurationError, match="is one of"):
        dpo(reference="public")
    with pytest.raises(ConfigurationError, match="sync_ref_model"):
        dpo(sync_ref_model=True)
    with pytest.raises(ConfigurationError, match="reference model was given"):
        ExpertDPOTrainer(model, args=ExpertDPOConfig(expert="math"), ref_model=model)
    with pytest.raises(ConfigurationError, match="load to balance"):
        dpo(router_aux_loss_coef=0.1)


def test_prompts_that_leave_no_room_for_any_answer_are_refused_before_training(dpo):
    with pytest.raises(ConfigurationError, match="Every prompt has max_length=3 tokens or more"):
        dpo(max_length=3)
    with pytest.raises(ConfigurationError, match="Every prompt has max_length=32 tokens or more"):
        dpo(eval_rows=[{**PAIRS[0], "prompt": "1 + " * 20}])
    # One that leaves some room is enough.
    dpo(max_length=8).train()
