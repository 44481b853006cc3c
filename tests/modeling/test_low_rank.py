"""Low-rank and narrow experts beside full ones: the same function as their full matrices, left out as exactly."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.composition.compress import full_matrix
from flexolmo_hf.errors import ConfigurationError, ExpertNotLoadedError, IncompleteCheckpointError, UnknownExpertError
from flexolmo_hf.modeling.expert import MATRICES
from flexolmo_hf.modeling.low_rank import LowRankExpert, NarrowExpert, describe_form, tensor_shapes
from tests.conftest import TINY
from tests.modeling.test_expert_sets import COPIES, NAMES, named_model, poison

#: Math and news of different ranks, code narrower than the others.
FORMS = {"math": {"rank": 4}, "code": {"width": 20}, "news": {"rank": 7}}
SETS = pytest.mark.parametrize(
    "kept", [["public", "math"], ["math"], ["math", "news"], ["code"], ["public", "code", "news"], NAMES], ids="+".join
)
WAYS = pytest.mark.parametrize("way", ["auto", "dense", "eager", "grouped_mm", "batched_mm"])
PER_TOKEN = pytest.mark.parametrize("per_token", [4, 2, 1], ids=["all of 4", "2 of 4", "1 of 4"])


def mixed(per_token=4, **changes):
    return named_model(per_token, expert_forms=FORMS, **changes)


def full(model):
    """Write a model of several forms as one of full matrices, by the definition of the forms."""
    config = copy.deepcopy(model.config)
    config.expert_forms, config.active_experts = {}, None
    made = FlexOlmoForCausalLM(config).eval()
    state = {key: tensor for key, tensor in model.state_dict().items() if ".experts." not in key}
    for layer, mixture in enumerate(model.mixtures):
        for index, name in enumerate(model.config.expert_names):
            form = model.config.expert_forms.get(name, {})
            for matrix in MATRICES:
                key = f"model.layers.{layer}.mlp.experts.{index}.{matrix}"
                own, public = mixture.experts[str(index)].get_parameter, mixture.experts["0"].get_parameter
                state[key] = full_matrix(
                    matrix, form, config.intermediate_size, own, lambda name=matrix, get=public: get(name)
                ).detach()
    made.load_state_dict(state)
    return made


@torch.no_grad()
def logits(model, input_ids, **options):
    return model.eval()(input_ids, **options).logits


@SETS
@PER_TOKEN
@WAYS
def test_every_form_computes_what_its_full_matrices_do(input_ids, way, per_token, kept):
    model = mixed(per_token)
    whole = full(model)
    for one in (model, whole):
        one.set_experts_implementation(way)
        one.set_active_experts(kept)

    torch.testing.assert_close(logits(model, input_ids), logits(whole, input_ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kept", [["public", "code"], ["code"], NAMES], ids="+".join)
@PER_TOKEN
@WAYS
def test_a_narrow_expert_beside_full_ones_computes_what_its_full_matrices_do(input_ids, way, per_token, kept):
    model = named_model(per_token, expert_forms={"code": {"width": 20}})
    whole = full(model)
    for one in (model, whole):
        one.set_experts_implementation(way)
        one.set_active_experts(kept)

    for ids in (input_ids, input_ids[:1, :1]):
        torch.testing.assert_close(logits(model, ids), logits(whole, ids), atol=1e-5, rtol=1e-5)


@PER_TOKEN
@WAYS
def test_rows_that_differ_in_their_sets_compute_what_the_full_matrices_do(input_ids, way, per_token):
    model = mixed(per_token)
    whole, sets = full(model), [["math"], ["public", "code", "news"], ["public"]]
    for one in (model, whole):
        one.set_experts_implementation(way)

    torch.testing.assert_close(
        logits(model, input_ids, active_experts=sets),
        logits(whole, input_ids, active_experts=sets),
        atol=1e-5,
        rtol=1e-5,
    )


def test_decoding_computes_what_the_full_matrices_do(input_ids):
    model = mixed(2)
    tokens = [m.generate(input_ids, max_new_tokens=8, do_sample=False) for m in (model, full(model))]

    assert torch.equal(*tokens)


@WAYS
@PER_TOKEN
def test_inactive_experts_of_any_form_cannot_influence_the_output(input_ids, way, per_token):
    model = mixed(per_token)
    model.set_experts_implementation(way)
    model.set_active_experts(["public", "math"])
    before = logits(model, input_ids)
    poison(model, ["code", "news"])
    after = logits(model, input_ids)

    assert after.isfinite().all()
    assert torch.equal(before, after)


@PER_TOKEN
def test_no_row_feels_another_rows_experts(input_ids, per_token):
    model, sets = mixed(per_token), [["math"], ["public", "code"], ["news"]]
    before = logits(model, input_ids, active_experts=sets)
    poison(model, ["news"])
    after = logits(model, input_ids, active_experts=sets)

    assert torch.equal(before[:2], after[:2])
    assert after[2].isnan().any()


def test_without_public_in_force_its_routing_is_off_and_its_matrices_are_still_used(input_ids):
    model = mixed()
    model.set_active_experts(["math"])
    before = logits(model, input_ids)
    with torch.no_grad():
        for mixture in model.mixtures:
            mixture.gate.weight[0] = float("nan")
    assert torch.equal(logits(model, input_ids), before)

    poison(model, ["public"])
    assert logits(model, input_ids).isnan().any()


def test_training_a_low_rank_expert_gives_the_public_expert_nothing(input_ids):
    model = mixed()
    model.requires_grad_(False)
    for module in model.expert_modules("math"):
        module.requires_grad_(True)
    model(input_ids, labels=input_ids).loss.backward()

    moved = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert moved == {
        f"model.layers.{layer}.mlp.experts.1.{name}"
        for layer in range(2)
        for name in tensor_shapes(64, 48, {"rank": 4})
    }


def test_the_public_weights_have_one_name_and_are_counted_once():
    model = mixed()
    keys = set(model.state_dict())

    assert keys == {name for name, _ in model.named_parameters()}
    assert {key.split("experts.1.")[1] for key in keys if "layers.0.mlp.experts.1." in key} == {
        f"{matrix}_proj.{factor}.weight" for matrix in ("gate", "up", "down") for factor in "AB"
    }
    lost = 3 * 64 * 48 - 4 * 3 * (64 + 48), 3 * 64 * 48 - 3 * 64 * 20, 3 * 64 * 48 - 7 * 3 * (64 + 48)
    assert named_model().num_parameters() - model.num_parameters() == 2 * sum(lost)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_is_relative_to_its_own_public_expert(input_ids, copied):
    model = mixed()
    before = logits(model, input_ids)
    other = copied(model)
    poison(model, NAMES)

    assert torch.equal(logits(other, input_ids), before)
    for mixture in other.mixtures:
        assert mixture.experts["1"].public is mixture.experts["0"]


def test_a_moved_model_computes_in_its_new_dtype(input_ids):
    model = mixed().to(torch.bfloat16)
    loose = {"atol": 0.2, "rtol": 0.1}

    assert logits(model, input_ids).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model, input_ids).float(), logits(full(model.float()), input_ids), **loose)


@pytest.mark.parametrize("kept", [None, ["public", "math"], ["code"], ["public", "news"]], ids=str)
def test_saving_and_loading_leave_no_gap_and_no_rest(tmp_path, input_ids, kept):
    model = mixed(2)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=kept, output_loading_info=True)
    model.set_active_experts(kept)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.expert_names == (kept or NAMES)
    assert [type(module) for module in loaded.mixtures[0].experts.values()] == [
        type(model.mixtures[0].experts[str(NAMES.index(name))]) for name in kept or NAMES
    ]
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))


def test_each_expert_lies_in_a_file_of_its_own_and_only_the_needed_ones_are_opened(tmp_path, input_ids):
    model = mixed()
    model.save_pretrained(tmp_path)
    for name in ("code", "news"):
        (tmp_path / f"model-expert-{name}-00001-of-00001.safetensors").write_bytes(b"garbage")
    loaded = FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["public", "math"])
    model.set_active_experts(["public", "math"])

    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))


def test_a_part_is_saved_as_a_checkpoint_of_its_own(tmp_path, input_ids):
    mixed().save_pretrained(tmp_path / "all")
    part = FlexOlmoForCausalLM.from_pretrained(tmp_path / "all", active_experts=["public", "news"])
    part.save_pretrained(tmp_path / "part")
    again = FlexOlmoForCausalLM.from_pretrained(tmp_path / "part")

    assert json.loads((tmp_path / "part/config.json").read_text())["expert_forms"] == {"news": {"rank": 7}}
    assert torch.equal(logits(again, input_ids), logits(part, input_ids))


def test_a_low_rank_expert_brings_the_public_matrices_with_it_out_of_force(tmp_path, input_ids):
    model = mixed()
    model.save_pretrained(tmp_path / "all")
    loaded = FlexOlmoForCausalLM.from_pretrained(tmp_path / "all", active_experts=["math"])
    model.set_active_experts(["math"])

    assert loaded.expert_names == ["public", "math"]
    assert loaded.active_experts == loaded.config.active_experts == ["math"]
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))

    loaded.save_pretrained(tmp_path / "math")
    again = FlexOlmoForCausalLM.from_pretrained(tmp_path / "math")
    assert again.active_experts == ["math"]
    assert torch.equal(logits(again, input_ids), logits(model, input_ids))


def test_a_narrow_expert_needs_no_public_one(tmp_path):
    mixed().save_pretrained(tmp_path)

    assert FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["code"]).expert_names == ["code"]


def test_the_public_expert_stays_while_others_are_relative_to_it(input_ids):
    model = mixed()
    with pytest.raises(ConfigurationError, match=r"\['math', 'news'\] are differences to 'public'"):
        model.remove_expert("public")
    for name in ("math", "news"):
        model.remove_expert(name)
    model.remove_expert("public")

    assert model.expert_names == ["code"]
    assert logits(model, input_ids).isfinite().all()


@pytest.mark.parametrize("name", ["math", "code"])
def test_an_expert_left_out_is_loaded_in_its_form(tmp_path, input_ids, name):
    model = mixed()
    model.save_pretrained(tmp_path)
    part = FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["public", "news"])
    part.load_expert(name)
    model.set_active_experts(part.expert_names)

    assert torch.equal(logits(part, input_ids), logits(model, input_ids))
    part.remove_expert(name)
    with pytest.raises(ExpertNotLoadedError):
        part.set_active_experts([name])


def test_a_low_rank_expert_is_not_loaded_beside_no_public_one(tmp_path):
    mixed().save_pretrained(tmp_path)
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["code"])
    with pytest.raises(ConfigurationError, match="'public', which is not in memory"):
        model.load_expert("math")
    assert model.expert_names == ["code"]

    model.load_expert("public")
    model.load_expert("math")
    assert model.expert_names == ["public", "math", "code"]


def test_a_checkpoint_that_lies_about_a_form_is_refused(tmp_path):
    mixed().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    settings = json.loads(file.read_text())
    settings["expert_forms"]["math"] = {"width": 20}
    file.write_text(json.dumps(settings))

    with pytest.raises(IncompleteCheckpointError, match="missing"):
        FlexOlmoForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("way", ["auto", "grouped_mm"])
def test_one_graph_holds_experts_of_all_forms(input_ids, way):
    model = mixed(2)
    model.set_experts_implementation(way)
    eager = logits(model, input_ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")

    torch.testing.assert_close(logits(compiled, input_ids), eager, atol=1e-5, rtol=1e-5)


def test_experts_of_several_forms_run_unpacked(input_ids):
    model = mixed(2)
    with pytest.raises(ConfigurationError, match="cannot be packed"):
        model.pack_experts()
    model.set_experts_implementation("grouped_mm")
    logits(model, input_ids)

    assert all(mixture.packed is None for mixture in model.mixtures)


WRONG = {
    "nothing": {"math": {}},
    "two at once": {"math": {"rank": 4, "width": 8}},
    "another kind": {"math": {"depth": 4}},
    "no rank": {"math": {"rank": 0}},
    "a rank beyond the matrices": {"math": {"rank": 49}},
    "full width": {"math": {"width": 48}},
    "the public expert": {"public": {"width": 8}},
}


@pytest.mark.parametrize("forms", WRONG.values(), ids=WRONG)
def test_what_is_no_form_is_refused(forms):
    with pytest.raises(ConfigurationError):
        FlexOlmoConfig(**TINY, num_experts=2, expert_names=["public", "math"], expert_forms=forms)


def test_a_form_of_an_unknown_expert_is_refused():
    with pytest.raises(UnknownExpertError, match="maht"):
        FlexOlmoConfig(**TINY, num_experts=2, expert_names=["public", "math"], expert_forms={"maht": {"rank": 2}})


def test_modules_and_words_tell_the_form():
    model = mixed()
    kinds = {name: type(model.expert_modules(name)[0]) for name in ("math", "code")}

    assert kinds == {"math": LowRankExpert, "code": NarrowExpert}
    assert "rank=4" in repr(model.expert_modules("math")[0])
    assert [describe_form(form) for form in (None, {"rank": 4}, {"width": 20})] == ["full", "rank 4", "width 20"]
