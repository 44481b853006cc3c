"""The plan's arithmetic against a real model: parameters, optimizer state, operations and activations counted on it."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from flexolmo_hf import ExpertSFTConfig, FlexOlmoConfig, FlexOlmoForCausalLM, freeze_except, plan_training
from flexolmo_hf.cli import app
from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.trainers.job import TrainingInputs
from flexolmo_hf.trainers.part import load_to_train
from flexolmo_hf.trainers.plan import MODELS, Assumptions, ModelSizes, TrainingPlan, layer_activation_bytes
from tests.conftest import dense_model

LENGTH = 64
SHAPES = {
    "plain": {},
    "grouped keys": {"num_key_value_heads": 2},
    "tied, with biases": {"tie_word_embeddings": True, "router_bias": True},
    "three experts": {"num_experts": 3},
    "deep": {"num_hidden_layers": 5, "intermediate_size": 192},
}
EVERY_SHAPE = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)


def small(**changes):
    settings = {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_experts": 2,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "attn_implementation": "eager",
        **changes,
    }
    return FlexOlmoForCausalLM(FlexOlmoConfig(**settings))


def plan_of(model, **changes):
    settings = {"experts": model.config.num_experts, "sequence": LENGTH, "gpus": 1, **changes}
    return TrainingPlan(ModelSizes.of(model.config), Assumptions(**settings))


def step(model, rows=2):
    ids = torch.randint(2, 256, (rows, LENGTH))
    model(ids, labels=ids, use_cache=False).loss.backward()
    return rows * LENGTH


@EVERY_SHAPE
def test_parameters_are_those_of_the_model(changes):
    model = small(**changes)
    total = sum(parameter.numel() for parameter in model.parameters())
    freeze_except(model, "expert_1")
    plan = plan_of(model)

    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.frozen + plan.trained == total


def test_the_released_models_are_counted_to_the_last_parameter():
    assert MODELS["7B"].total(2) == 11_627_401_216
    assert MODELS["7B"].total(7) == 33_270_665_216


def test_the_default_is_the_dtype_in_which_the_trainers_load_a_model(tmp_path):
    small().to(torch.bfloat16).save_pretrained(tmp_path)
    model = load_to_train(tmp_path, ExpertSFTConfig(expert="expert_1", output_dir=str(tmp_path / "run"), bf16=False))
    freeze_except(model, "expert_1")
    plan, said = plan_training(str(tmp_path)), CliRunner().invoke(app, ["plan", "--model", str(tmp_path)]).output

    assert plan.assumptions.frozen_bytes == next(p for p in model.parameters() if not p.requires_grad).element_size()
    assert plan.assumptions.trained_bytes == next(p for p in model.parameters() if p.requires_grad).element_size()
    assert f"{plan.frozen:,} of 4 bytes" in said


def test_gradients_and_optimizer_state_are_those_of_a_real_step():
    model = small(router_bias=True)
    freeze_except(model, "expert_1")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    step(model)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    memory = plan_of(model).memory

    assert memory.optimizer == sum(tensor.nbytes for tensor in moments)
    assert memory.gradients == sum(parameter.grad.nbytes for parameter in trained)
    assert memory.trained == sum(parameter.nbytes for parameter in trained)


@EVERY_SHAPE
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_operations_are_those_of_a_real_step(changes, checkpointing):
    model = small(**changes).train()
    freeze_except(model, "expert_1")
    if checkpointing:
        model.activation_checkpointing_enable()
    with FlopCounterMode(display=False) as counter:
        tokens = step(model)
    planned = plan_of(model, checkpointing=checkpointing).flops_per_token

    assert planned == pytest.approx(counter.get_total_flops() / tokens, rel=0.02)


def test_operations_of_a_low_rank_expert_are_those_of_a_real_step():
    model, rank = small().train(), 16
    freeze_except(model, "expert_1")
    for module in model.expert_modules("expert_1"):
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(module, name, LowRank(getattr(module, name), rank))
    with FlopCounterMode(display=False) as counter:
        tokens = step(model)
    plan = plan_of(model, lora=rank, checkpointing=False)

    assert plan.trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert plan.flops_per_token == pytest.approx(counter.get_total_flops() / tokens, rel=0.02)


class LowRank(torch.nn.Module):
    """A frozen linear layer and a difference of low rank."""

    def __init__(self, frozen, rank):
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = torch.nn.Linear(frozen.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, frozen.out_features, bias=False)

    def forward(self, hidden):
        return self.frozen(hidden) + self.up(self.down(hidden))


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_activations_are_about_what_a_real_step_keeps(checkpointing):
    model = small(num_hidden_layers=8, attn_implementation="sdpa", vocab_size=256).train()
    freeze_except(model, "expert_1")
    if checkpointing:
        model.activation_checkpointing_enable()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    ids = torch.randint(2, 256, (2, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(ids, use_cache=False)
    found = sum(storage.nbytes() for storage in kept.values())
    assert output.last_hidden_state.requires_grad
    plan = plan_of(model, checkpointing=checkpointing, micro_batch=2, activation_bytes=4)
    # The layer at work is computed again in the backward pass, which has not begun.
    later = layer_activation_bytes(plan.sizes, plan.assumptions) if checkpointing else 0

    assert plan.memory.activations - later == pytest.approx(found, rel=0.1)


def test_sharding_divides_what_is_kept_and_leaves_activations_as_they_are():
    one, eight = plan_training("7B", gpus=1).memory, plan_training("7B", gpus=8).memory

    for name in ("frozen", "trained", "gradients", "optimizer"):
        assert getattr(eight, name) * 8 == pytest.approx(getattr(one, name))
    assert eight.activations == one.activations
    assert plan_training("7B", gpus=8, strategy="ddp").memory == one


def test_a_plan_that_does_not_fit_says_what_would():
    plan = plan_training("7B", gpus=1, strategy="ddp")
    remedies = dict(plan.remedies())

    assert not plan.fits
    assert {"--lora 64", "--gpus 2 --strategy fsdp"} == set(remedies)
    assert remedies["--lora 64"] == plan_training("7B", gpus=1, lora=64).memory.total
    assert all(total <= 80e9 for total in remedies.values())
    in_bf16 = dict(plan_training("7B", gpus=1, strategy="ddp", frozen_bytes=2).remedies())
    assert set(in_bf16) == {*remedies, "--optimizer-bytes 2 (an 8-bit AdamW)"}
    assert plan_training("7B", gpus=8).remedies() == []


def test_time_follows_from_operations():
    plan = plan_training("7B", gpus=8, tokens=1e9, peak_flops=1e15, utilisation=0.5)

    assert plan.tokens_per_second == pytest.approx(8 * 0.5e15 / plan.flops_per_token)
    assert plan.days == pytest.approx(1e9 / plan.tokens_per_second / 86_400)


def test_sizes_come_from_a_checkpoint_of_this_architecture_or_a_dense_one(tmp_path):
    small().config.save_pretrained(tmp_path / "flex")
    dense_model().config.save_pretrained(tmp_path / "dense")

    assert plan_training(str(tmp_path / "flex")).sizes == ModelSizes.of(small().config)
    assert plan_training(str(tmp_path / "dense" / "config.json")).sizes == ModelSizes.of(dense_model().config)


REFUSED = {
    "no such model": ({"model": "8B"}, ConfigurationError, "no model '8B'"),
    "no gpu": ({"gpus": 0}, ConfigurationError, "gpus is 0"),
    "another strategy": ({"strategy": "tp"}, ConfigurationError, "'ddp', 'fsdp'"),
    "one expert": ({"experts": 1}, ConfigurationError, "beside the public one"),
    "more than the peak": ({"utilisation": 1.5}, ConfigurationError, "share of the peak"),
    "a negative rank": ({"lora": -1}, ConfigurationError, "lora is -1"),
}


@pytest.mark.parametrize(("arguments", "error", "says"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_planned_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        plan_training(**arguments)


def test_another_architecture_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(NotFlexOlmoError):
        plan_training(str(tmp_path))


def test_the_command_prints_every_part_and_the_speed():
    done = CliRunner().invoke(app, ["plan", "--model", "7B", "--gpus", "8"])
    said = " ".join(done.output.split())

    assert done.exit_code == 0
    for part in ("frozen parameters", "7,298,748,416", "gradients", "optimizer state", "activations", "tokens per day"):
        assert part in said, part
    assert said.endswith("It fits.")


def test_the_command_says_what_to_change_and_names_a_mistake():
    lacking = CliRunner().invoke(app, ["plan", "--gpus", "1"])
    mistaken = CliRunner().invoke(app, ["plan", "--strategy", "both"])

    assert "It does not fit. What would:" in lacking.output
    assert (mistaken.exit_code, "'ddp', 'fsdp'" in mistaken.output) == (2, True)


LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch"


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_a_ready_configuration_carries_the_arithmetic_of_its_plan(gpus):
    text = (LAUNCH / f"train_7b_{gpus}.yaml").read_text()
    said = " ".join(text.split())
    options = re.search(r"flexolmo plan (.*)", text)[1].split()
    settings = {name[2:].replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)}
    kinds = {"gpus": int, "micro_batch": int, "lora": int, "frozen_bytes": float, "tokens": float}
    plan = plan_training(**{name: kinds.get(name, str)(value) for name, value in settings.items()})

    for name in ("frozen", "trained", "gradients", "optimizer", "activations", "overhead", "total"):
        assert f"{name} {getattr(plan.memory, name) / 1e9:.1f}" in said, name
    assert f"working copies {plan.memory.working / 1e9:.1f}" in said
    assert f"{plan.tokens_per_day / 1e9:.2f} B tokens per day" in said
    assert f"{plan.days:.1f} days" in said
    assert plan.fits


@pytest.mark.parametrize("gpus", [1, 8, 64])
def test_a_ready_configuration_is_read_and_trains_the_tokens_it_says(gpus):
    from accelerate.commands.config.config_args import load_config_from_file

    launch = load_config_from_file(str(LAUNCH / f"accelerate_{gpus}.yaml"))
    text = (LAUNCH / f"train_7b_{gpus}.yaml").read_text()
    job = yaml.safe_load(text)
    known = {field.name for kind in (TrainingInputs, ExpertSFTConfig) for field in dataclasses.fields(kind)}
    per_step = gpus * job["per_device_train_batch_size"] * job["gradient_accumulation_steps"] * job["max_length"]

    assert launch.num_processes == gpus
    assert set(job) <= known
    assert f"({per_step:,} per step)" in text
    assert per_step * job["max_steps"] == pytest.approx(1e9 if gpus == 1 else 50e9, rel=1e-3)
