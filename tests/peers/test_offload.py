"""Where the weights lie changes no result: in memory, or on disk and read when a layer runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf import ExpertPackage, FlexOlmoConfig, FlexOlmoForCausalLM, freeze_except
from flexolmo_hf.errors import ConfigurationError, FlexOlmoError
from tests.conftest import TINY
from tests.modeling.test_expert_sets import NAMES, named_model, poison
from tests.peers import run_section

pytest.importorskip("accelerate")

LAST_ON_DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}
BOTH_ON_DISK = {**LAST_ON_DISK, "model.layers.0": "disk"}
PLACES = {"auto": "auto", "cpu": "cpu", "map": {"": "cpu"}, "last on disk": LAST_ON_DISK, "both on disk": BOTH_ON_DISK}
SETS = pytest.mark.parametrize("names", [NAMES, ["public", "code"], ["math", "code", "news"]], ids="+".join)
EVERY_PATH = pytest.mark.parametrize("per_token", [4, 2], ids=["all of 4", "2 of 4"])


def load(folder, names, place=LAST_ON_DISK, **options):
    """Load some experts; what goes to disk goes to a folder beside the checkpoint."""
    options.setdefault("offload_folder", folder.parent / "offloaded")
    return AutoModelForCausalLM.from_pretrained(folder, active_experts=names, device_map=place, **options)


def named_shapes():
    """A model without weights, to be filled later."""
    return FlexOlmoForCausalLM(FlexOlmoConfig(**TINY, num_experts=4, expert_names=NAMES))


def on_disk(model):
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@SETS
@pytest.mark.parametrize("per_token", [4, 2], ids=["all of 4, bias", "2 of 4"])
@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
@torch.no_grad()
def test_where_the_weights_lie_changes_no_logit(tmp_path, input_ids, names, per_token, place):
    model = named_model(per_token, router_bias=per_token == 4)
    model.save_pretrained(tmp_path / "model")
    model.set_active_experts(names)
    placed = load(tmp_path / "model", names, place)

    assert bool(on_disk(placed)) == (place in (LAST_ON_DISK, BOTH_ON_DISK))
    assert placed.expert_names == names
    assert torch.equal(placed(input_ids).logits, model(input_ids).logits)


@torch.no_grad()
def test_every_part_of_a_layer_on_disk_is_read_from_there(tmp_path):
    named_model(router_bias=True).save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", ["public", "code"])

    assert {name.removeprefix("model.layers.1.mlp.") for name in on_disk(model) if ".mlp." in name} == {
        "gate.weight",
        "gate.bias",
        *(f"experts.{index}.{matrix}_proj.weight" for index in (0, 2) for matrix in ("gate", "up", "down")),
    }


@SETS
@torch.no_grad()
def test_weights_on_disk_take_the_precision_that_was_asked_for(tmp_path, input_ids, names):
    named_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    model.set_active_experts(names)
    placed = load(tmp_path / "model", names, dtype=torch.bfloat16)

    assert placed.dtype == torch.bfloat16
    assert torch.equal(placed(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@torch.no_grad()
def test_no_way_of_running_the_experts_passes_the_disk_by(tmp_path, input_ids, implementation):
    named_model(per_token=2).save_pretrained(tmp_path / "model")
    options = {"experts_implementation": implementation}
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    placed = load(tmp_path / "model", NAMES, **options)

    assert torch.allclose(placed(input_ids).logits, plain(input_ids).logits, atol=1e-5)


@EVERY_PATH
def test_a_set_is_switched_with_weights_on_disk(tmp_path, input_ids, per_token):
    model = named_model(per_token)
    poison(model, ["code"])
    model.save_pretrained(tmp_path / "model")
    placed = load(tmp_path / "model", NAMES)
    with model.use_experts("math", "news"), placed.use_experts("math", "news"), torch.no_grad():
        expected, logits = model(input_ids).logits, placed(input_ids).logits
        assert torch.equal(
            placed.generate(input_ids, max_new_tokens=4, do_sample=False),
            model.generate(input_ids, max_new_tokens=4, do_sample=False),
        )

    assert logits.isfinite().all()
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_two_models_may_share_an_offload_folder(tmp_path, input_ids):
    named_model().save_pretrained(tmp_path / "model")
    # Sets of one size: rows of the other one would fit without anyone noticing.
    first = load(tmp_path / "model", ["public", "math"])
    before = first(input_ids).logits
    load(tmp_path / "model", ["public", "code"])

    assert torch.equal(first(input_ids).logits, before)


@SETS
@torch.no_grad()
def test_a_model_on_disk_is_saved_like_any_other(tmp_path, input_ids, names):
    named_model().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", names)
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")

    assert again.expert_names == names
    assert torch.equal(again(input_ids).logits, expected)
    assert torch.equal(model(input_ids).logits, expected)


def test_disk_without_a_folder_to_put_the_router_in_is_refused(tmp_path):
    named_model().save_pretrained(tmp_path / "model")

    with pytest.raises(ValueError, match="provide an `offload_folder`"):
        load(tmp_path / "model", ["public", "code"], offload_folder=None)


def test_a_damaged_expert_that_was_left_out_does_no_harm_to_a_model_on_disk(tmp_path, input_ids):
    model = named_model()
    expected = named_model()
    expected.load_state_dict(model.state_dict())
    poison(model, ["math", "news"])
    model.save_pretrained(tmp_path / "model")
    placed = load(tmp_path / "model", ["public", "code"], BOTH_ON_DISK)
    with torch.no_grad(), expected.use_experts("public", "code"):
        assert torch.equal(placed(input_ids).logits, expected(input_ids).logits)


def test_a_misspelt_expert_is_refused_before_anything_is_written(tmp_path):
    named_model().save_pretrained(tmp_path / "model")

    with pytest.raises(FlexOlmoError, match="Did you mean 'math'"):
        load(tmp_path / "model", ["public", "maht"])
    assert not (tmp_path / "offloaded").exists()


def test_an_adapter_beside_weights_on_disk_is_refused(tmp_path):
    # PEFT would put it on no device, and the layer would compute with whatever memory holds.
    peft = pytest.importorskip("peft")
    named_model().save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])

    with pytest.raises(ConfigurationError, match="weights are offloaded"):
        peft.get_peft_model(load(tmp_path / "model", NAMES), config)
    assert peft.get_peft_model(load(tmp_path / "model", NAMES, "auto"), config)
    with torch.device("meta"):
        assert peft.get_peft_model(named_shapes(), config)


def test_the_page_shows_what_runs(tmp_path, monkeypatch, input_ids):
    monkeypatch.chdir(tmp_path)
    named_model().save_pretrained("MERGED")

    assert on_disk(run_section("Weights on disk", input_ids=input_ids)["model"])


@pytest.mark.parametrize(
    "act",
    [
        lambda model: freeze_except(model, "math"),
        lambda model: ExpertPackage.from_model(model, "math"),
        lambda model: model.load_expert("news"),
        lambda model: model.remove_expert("math"),
    ],
    ids=["train", "pack", "load another", "remove one"],
)
def test_what_needs_the_weights_at_hand_is_refused_where_they_lie_on_disk(tmp_path, act):
    named_model().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", ["public", "math"], BOTH_ON_DISK)
    with pytest.raises(ConfigurationError, match="offloaded"):
        act(model)
