"""LoRA reaches the experts it names and no other, whatever is in memory, and comes back from its files unchanged."""

import importlib
import re
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flexolmo_hf.errors import EmptyExpertSetError, ExpertNotLoadedError, UnknownExpertError
from flexolmo_hf.modeling.adapters import expert_targets, keep_targets_as_written
from tests.conftest import stock_model
from tests.modeling.test_expert_sets import NAMES, named_model
from tests.peers import run_section

peft = pytest.importorskip("peft")

LAYERS, MATRICES = range(2), ("gate_proj", "up_proj", "down_proj")
MATH = [f"model.layers.{layer}.mlp.experts.1.{matrix}" for layer in LAYERS for matrix in MATRICES]
TARGETS = {
    "attention": lambda model: ["q_proj", "v_proj"],
    "one expert": lambda model: expert_targets(model, "math"),
    "one expert, listed": lambda model: MATH,
    "one expert and attention": lambda model: f"{expert_targets(model, 'math')}|.*[qv]_proj",
    "one matrix of every expert": lambda model: ["up_proj"],
    "all linear": lambda model: "all-linear",
}
EVERY_TARGET = pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS.keys())
EVERY_PATH = pytest.mark.parametrize("per_token", [4, 2], ids=["all of 4", "2 of 4"])


def adapted(model, targets, **options):
    config = peft.LoraConfig(r=2, target_modules=targets(model), task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


def adapted_modules(model):
    return {name.split(".lora_A")[0].split("base_model.model.")[-1] for name, _ in lora(model) if ".lora_A" in name}


def lora(model):
    return [(name, p) for name, p in model.named_parameters() if ".lora_" in name]


def trained(model):
    """Give the adapter values of its own: a fresh one changes nothing."""
    for _, parameter in lora(model):
        parameter.data.normal_(std=0.2)
    return model.eval()


@pytest.fixture
def saved(tmp_path):
    model = named_model()
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


@EVERY_TARGET
def test_an_adapter_goes_where_its_targets_say(targets):
    model = named_model()
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    attention = {name for name in linear if name.endswith(("q_proj", "v_proj"))}
    expected = {
        "attention": attention,
        "one expert": set(MATH),
        "one expert, listed": set(MATH),
        "one expert and attention": {*MATH, *attention},
        "one matrix of every expert": {name for name in linear if name.endswith("up_proj")},
        "all linear": linear,
    }
    label = next(name for name, known in TARGETS.items() if known is targets)

    assert adapted_modules(adapted(model, targets)) == expected[label]


@EVERY_TARGET
@EVERY_PATH
def test_one_step_moves_the_adapter_and_nothing_else(input_ids, targets, per_token):
    model = adapted(named_model(per_token), targets)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    model(input_ids=input_ids, labels=input_ids).loss.backward()
    optimizer.step()

    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved
    assert moved <= {name for name, _ in lora(model)}
    # B starts at zero and so is what the first step moves; every adapted matrix has one.
    assert {name.split(".lora_B")[0] for name in moved if ".lora_B" in name} == {
        name.split(".lora_A")[0] for name, _ in lora(model) if ".lora_A" in name
    }


@EVERY_TARGET
@torch.no_grad()
def test_a_saved_adapter_comes_back_as_it_was(tmp_path, saved, input_ids, targets):
    base, folder = saved
    plain = base(input_ids).logits
    model = trained(adapted(base, targets))
    model.save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=input_ids).logits

    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    beside = AutoModelForCausalLM.from_pretrained(folder)
    report = beside.load_adapter(tmp_path / "adapter")
    assert not torch.equal(expected, plain)
    assert torch.equal(loaded(input_ids=input_ids).logits, expected)
    assert not report.missing_keys
    assert torch.equal(beside(input_ids).logits, expected)


@EVERY_TARGET
@torch.no_grad()
def test_a_merged_adapter_is_part_of_an_ordinary_checkpoint(tmp_path, saved, input_ids, targets):
    base, folder = saved
    keys = set(base.state_dict())
    model = trained(adapted(base, targets))
    expected = model(input_ids=input_ids).logits
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")

    assert set(merged.state_dict()) == keys
    assert torch.allclose(merged(input_ids).logits, expected, atol=1e-4)


@EVERY_PATH
@torch.no_grad()
def test_an_adapter_made_with_some_experts_fits_the_checkpoint_loaded_with_others(tmp_path, input_ids, per_token):
    named_model(per_token).save_pretrained(tmp_path / "base")
    some = AutoModelForCausalLM.from_pretrained(tmp_path / "base", active_experts=["public", "code"])
    model = trained(adapted(some, lambda model: expert_targets(model, "code")))
    model.save_pretrained(tmp_path / "adapter")
    expected = model(input_ids=input_ids).logits

    for loaded in (NAMES, ["public", "code", "news"]):
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", active_experts=loaded)
        other = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
        with other.use_experts("public", "code"):
            assert torch.equal(other(input_ids=input_ids).logits, expected)


def test_an_adapter_of_the_only_expert_in_memory_reaches_no_other_expert_later(tmp_path):
    # Seven layers of three matrices are enough names for PEFT to shorten a list of them.
    named_model(num_hidden_layers=7).save_pretrained(tmp_path / "base")
    alone = AutoModelForCausalLM.from_pretrained(tmp_path / "base", active_experts=["math"])
    adapted(alone, lambda model: expert_targets(model, "math")).save_pretrained(tmp_path / "adapter")
    everyone = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.PeftModel.from_pretrained(everyone, tmp_path / "adapter")

    assert {re.search(r"experts\.(\d+)", name)[1] for name in adapted_modules(model)} == {"1"}


@EVERY_PATH
@torch.no_grad()
def test_the_adapter_of_an_expert_that_is_off_cannot_influence_the_output(input_ids, per_token):
    base = named_model(per_token)
    base.set_active_experts(["public", "news"])
    before = base(input_ids).logits
    model = adapted(base, lambda model: expert_targets(model, "math", "code"))
    for _, parameter in lora(model):
        parameter.fill_(float("nan"))

    assert torch.equal(model(input_ids=input_ids).logits, before)
    with model.use_experts("public", "math"):
        assert model(input_ids=input_ids).logits.isnan().any()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_no_way_of_running_the_experts_passes_an_adapter_by(input_ids, implementation):
    model = named_model(per_token=2)
    model.set_experts_implementation(implementation)
    before = model(input_ids).logits
    with_adapter = trained(adapted(model, lambda model: expert_targets(model, *NAMES)))
    after = with_adapter(input_ids=input_ids).logits
    merged = with_adapter.merge_and_unload()(input_ids).logits

    assert not torch.allclose(after, before, atol=1e-2)
    assert torch.allclose(merged, after, atol=1e-4)


def test_generation_with_an_adapter_follows_the_set(tmp_path, saved, input_ids):
    base, folder = saved
    model = trained(adapted(base, lambda model: expert_targets(model, "math")))
    model.save_pretrained(tmp_path / "adapter")
    with model.use_experts("public", "math"):
        expected = model.generate(input_ids=input_ids, max_new_tokens=4, do_sample=False)
    part = AutoModelForCausalLM.from_pretrained(folder, active_experts=["public", "math"])
    loaded = peft.PeftModel.from_pretrained(part, tmp_path / "adapter")

    assert torch.equal(loaded.generate(input_ids=input_ids, max_new_tokens=4, do_sample=False), expected)


def test_an_adapter_of_an_expert_that_was_left_out_is_refused(tmp_path, saved):
    base, folder = saved
    adapted(base, lambda model: expert_targets(model, "math")).save_pretrained(tmp_path / "adapter")
    part = AutoModelForCausalLM.from_pretrained(folder, active_experts=["public", "code"])

    with pytest.raises(ValueError, match="Target modules .* not found"):
        peft.PeftModel.from_pretrained(part, tmp_path / "adapter")


@torch.no_grad()
def test_an_adapter_saved_by_the_model_itself_keeps_checkpoint_indices(tmp_path, saved, input_ids):
    _, folder = saved
    part = AutoModelForCausalLM.from_pretrained(folder, active_experts=["public", "news"])
    part.add_adapter(peft.LoraConfig(r=2, target_modules=expert_targets(part, "news")))
    trained(part).save_pretrained(tmp_path / "adapter")
    expected = part(input_ids).logits

    other = AutoModelForCausalLM.from_pretrained(folder)
    report = other.load_adapter(tmp_path / "adapter")
    assert not report.missing_keys
    with other.use_experts("public", "news"):
        assert torch.equal(other(input_ids).logits, expected)


def test_targets_of_the_stock_class_are_rewritten_as_before():
    targets = {"target_modules": ["q_proj", *MATRICES]}
    stock = peft.get_peft_model(stock_model(), peft.LoraConfig(r=2, **targets))

    assert stock.peft_config["default"].target_parameters == {"gate_up_proj", "down_proj"}
    assert stock.peft_config["default"].target_modules == {"q_proj"}


@pytest.mark.parametrize("imported", [True, False], ids=["PEFT imported before", "PEFT imported after"])
def test_the_order_of_imports_makes_no_difference(monkeypatch, imported):
    name = "peft.utils.transformers_weight_conversion"
    if imported:
        conversion = importlib.reload(importlib.import_module(name))
        assert conversion.convert_peft_config_for_transformers.__module__ == name
    else:
        monkeypatch.delitem(sys.modules, name)
    keep_targets_as_written()
    keep_targets_as_written()
    conversion = importlib.import_module(name)

    assert conversion.convert_peft_config_for_transformers.__module__ == keep_targets_as_written.__module__
    assert len(adapted_modules(adapted(named_model(), lambda model: ["up_proj"]))) == 8


def test_targets_are_asked_for_by_names_that_are_in_memory(saved):
    part = AutoModelForCausalLM.from_pretrained(saved[1], active_experts=["public", "math"])

    with pytest.raises(UnknownExpertError, match="Did you mean 'math'"):
        expert_targets(part, "maht")
    with pytest.raises(ExpertNotLoadedError):
        expert_targets(part, "code")
    with pytest.raises(EmptyExpertSetError):
        expert_targets(part)


def test_targets_fit_the_backbone_alone_too():
    backbone = named_model().model
    model = peft.get_peft_model(backbone, peft.LoraConfig(r=2, target_modules=expert_targets(backbone, "math")))

    assert adapted_modules(model) == {name.removeprefix("model.") for name in MATH}


def test_the_page_shows_what_runs(tmp_path, monkeypatch, input_ids):
    monkeypatch.chdir(tmp_path)
    named_model().save_pretrained("MERGED")
    run_section("LoRA on one expert", input_ids=input_ids)

    assert AutoModelForCausalLM.from_pretrained("MERGED_WITH_ADAPTER").expert_names == NAMES
