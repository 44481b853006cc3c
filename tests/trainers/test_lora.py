"""With `lora_r` the trainer trains one expert's low-rank factors, and its run ends in a low-rank package."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError
from tests.trainers.conftest import TEXT
from tests.trainers.test_freezing import state


def test_exactly_the_factors_the_row_and_the_bias_are_trained(trainer, model):
    run = trainer(TEXT, lora_r=4)
    before = state(model)
    run.train()
    after = state(model)

    assert model.config.expert_forms == {"math": {"rank": 4}}
    assert sum(p.requires_grad for p in model.parameters()) == 2 * (6 + 2)
    for key in before:
        own = ".experts.1." in key or ".mlp.gate." in key
        assert torch.equal(after[key], before[key]) != own, key
        if ".mlp.gate." in key:
            assert torch.equal(after[key][0], before[key][0]), key


def test_without_it_the_whole_expert_is_trained(trainer, model):
    trainer(TEXT)

    assert model.config.expert_forms == {}


def test_a_run_that_is_resumed_ends_as_if_it_had_not_been_interrupted(trainer, model, settings, tmp_path):
    model.save_pretrained(tmp_path / "start")
    options = {"lora_r": 4, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(TEXT, using=str(tmp_path / "start"), output_dir=str(tmp_path / "whole"), **options).train()
    run = trainer(TEXT, using=str(tmp_path / "start"), output_dir=str(tmp_path / "again"), **options)
    run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    want = FlexOlmoForCausalLM.from_pretrained(tmp_path / "whole" / "checkpoint-4")

    found = state(run.model)
    assert all(torch.equal(tensor, found[key]) for key, tensor in state(want).items())


def test_a_saved_run_loads_and_packs_in_its_low_rank_form(trainer, model, tmp_path):
    run = trainer(TEXT, lora_r=4)
    run.train()
    run.save_model(str(tmp_path / "saved"))
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    package = ExpertPackage.from_model(loaded, "math")

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert package.manifest.form == {"rank": 4}
    assert package.tensors["layers.0.up_proj.B.weight"].count_nonzero() > 0


def test_an_expert_that_has_learned_something_is_not_replaced(trainer, model):
    with torch.no_grad():
        model.expert_modules("math")[1].up_proj.weight[0, 0] += 1
    with pytest.raises(ConfigurationError, match="compress a trained one"):
        trainer(TEXT, lora_r=4)
