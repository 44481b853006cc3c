"""Opting out is exact: an expert that is off is neither computed nor routed to, and its absence leaves no trace."""

import copy
import json
import pickle
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.errors import (
    ConfigurationError,
    DuplicateExpertError,
    EmptyExpertSetError,
    ExpertNotLoadedError,
    ExpertTypeError,
    UnknownExpertError,
)
from tests.conftest import TINY, shaken

NAMES = ["public", "math", "code", "news"]
EVERY_PATH = pytest.mark.parametrize("per_token", [4, 2, 1], ids=["all of 4", "2 of 4", "1 of 4"])
OFF = pytest.mark.parametrize("off", [["code"], ["math", "news"], ["public"], ["public", "math", "code"]], ids="+".join)
COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


def named_model(per_token=4, **changes):
    settings = {**TINY, "num_experts": 4, "expert_names": NAMES, "num_experts_per_tok": per_token, **changes}
    model = shaken(FlexOlmoForCausalLM(FlexOlmoConfig(**settings)))
    for mixture in model.mixtures:
        if mixture.gate.bias is not None:
            mixture.gate.bias.data[0] = 0.0
    return model


def poison(model, names):
    """Fill everything that belongs to these experts with NaN: weight 0 times NaN would still be NaN."""
    for name in names:
        position = model.expert_position(name)
        for mixture, expert in zip(model.mixtures, model.expert_modules(name), strict=True):
            mixture.gate.weight.data[position] = float("nan")
            for parameter in expert.parameters():
                parameter.data.fill_(float("nan"))


def others(off):
    return [name for name in NAMES if name not in off]


@OFF
@EVERY_PATH
@torch.no_grad()
def test_inactive_experts_cannot_influence_the_output(input_ids, per_token, off):
    model = named_model(per_token)
    model.set_active_experts(others(off))
    before = model(input_ids).logits
    poison(model, off)
    after = model(input_ids).logits

    assert after.isfinite().all()
    assert torch.equal(before, after)


@OFF
@EVERY_PATH
def test_inactive_experts_cannot_influence_generation_with_a_cache(input_ids, per_token, off):
    model = named_model(per_token)
    with model.use_experts(*others(off)):
        before = model.generate(input_ids, max_new_tokens=6, do_sample=False)
        poison(model, off)
        after = model.generate(input_ids, max_new_tokens=6, do_sample=False)

    assert torch.equal(before, after)


def test_the_poison_would_show(input_ids):
    model = named_model()
    poison(model, ["code"])

    assert model(input_ids).logits.isnan().any()


def test_inactive_experts_receive_no_gradient(input_ids):
    model = named_model()
    with model.use_experts("public", "math"):
        model(input_ids, labels=input_ids).loss.backward()

    grads = {name: [p.grad for module in model.expert_modules(name) for p in module.parameters()] for name in NAMES}
    assert all(grad is None for grad in grads["code"] + grads["news"])
    assert all(grad.abs().sum() > 0 for grad in grads["public"] + grads["math"])


@OFF
@EVERY_PATH
@torch.no_grad()
@pytest.mark.parametrize("router_bias", [False, True], ids=["no bias", "bias"])
def test_left_out_at_load_switched_off_and_never_there_are_the_same_bit_for_bit(
    tmp_path, input_ids, per_token, off, router_bias
):
    model = named_model(per_token, router_bias=router_bias)
    model.save_pretrained(tmp_path / "all")
    model.set_active_experts(others(off))
    live = model(input_ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all", active_experts=others(off))
    loaded.save_pretrained(tmp_path / "never")
    never = AutoModelForCausalLM.from_pretrained(tmp_path / "never")

    assert never.expert_names == never.config.expert_names == others(off)
    assert torch.equal(loaded(input_ids).logits, live)
    assert torch.equal(never(input_ids).logits, live)


def test_one_expert_alone_takes_all_the_mass(input_ids):
    model = named_model()
    model.set_active_experts(["math"])
    _, probs = model.model.layers[0].mlp.gate(torch.randn(2, 3, TINY["hidden_size"]), model.mixtures[0].in_force)

    assert torch.equal(probs, torch.ones(2, 3, 1))


def test_the_order_in_which_a_set_is_written_changes_nothing(input_ids):
    model = named_model()
    with model.use_experts("public", "news"):
        one = model(input_ids).logits
    with model.use_experts("news", "public"):
        assert model.active_experts == ["public", "news"]
        assert torch.equal(model(input_ids).logits, one)


def test_a_with_block_gives_the_former_set_back_also_after_an_error():
    model = named_model()
    model.set_active_experts(["public", "math"])
    with pytest.raises(RuntimeError), model.use_experts("news"):
        assert model.active_experts == ["news"]
        raise RuntimeError

    assert model.active_experts == ["public", "math"]


def test_the_set_in_force_is_shown_by_the_configuration():
    model = named_model()
    model.set_active_experts(["public", "news"])

    assert model.config.active_experts == ["public", "news"]
    assert '"active_experts": [\n    "public",\n    "news"\n  ]' in repr(model.config)


def test_two_models_that_share_a_configuration_keep_their_own_sets():
    config = FlexOlmoConfig(**TINY, num_experts=4, expert_names=NAMES)
    one, two = FlexOlmoForCausalLM(config), FlexOlmoForCausalLM(config)
    one.set_active_experts(["public"])

    assert one.active_experts == ["public"]
    assert two.active_experts == NAMES


def test_a_set_that_was_in_force_when_saving_is_in_force_when_loading(tmp_path):
    model = named_model()
    model.set_active_experts(["public", "math"])
    model.save_pretrained(tmp_path)

    assert AutoModelForCausalLM.from_pretrained(tmp_path).active_experts == ["public", "math"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=NAMES).active_experts == NAMES
    assert AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=None).active_experts == NAMES


def test_upstream_balancing_loss_counts_the_active_experts(input_ids):
    model = named_model(per_token=3)
    with model.use_experts("public", "code"):
        output = model(input_ids, output_router_logits=True)

    assert output.router_logits[0].shape == (input_ids.numel(), 2)
    assert output.aux_loss.isfinite()


REFUSED = {
    "unknown": (["public", "maht"], UnknownExpertError, "Did you mean 'math'"),
    "duplicate": (["math", "math"], DuplicateExpertError, "appears twice"),
    "empty": ([], EmptyExpertSetError, "needs at least one"),
    "an index": ([0, 1], ExpertTypeError, "Expert 0 is called 'public'"),
    "one index": (1, ExpertTypeError, "Expert 1 is called 'math'"),
    "nested": ([["public"]], ExpertTypeError, "not an expert name"),
}


@pytest.mark.parametrize(("names", "error", "text"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("level", ["load", "live", "configuration"])
def test_a_set_that_makes_no_sense_is_refused_and_changes_nothing(tmp_path, level, names, error, text):
    model = named_model()
    model.save_pretrained(tmp_path)
    actions = {
        "load": lambda: AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=names),
        "live": lambda: model.set_active_experts(names),
        "configuration": lambda: FlexOlmoConfig.from_pretrained(tmp_path, active_experts=names),
    }

    with pytest.raises(error, match=text) as caught:
        actions[level]()
    assert model.active_experts == NAMES
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_an_expert_that_was_left_out_is_told_apart_from_one_that_does_not_exist(tmp_path):
    named_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["public", "math"])

    with pytest.raises(
        ExpertNotLoadedError, match=r"load the model again with active_experts=\['public', 'math', 'code'\]"
    ):
        model.set_active_experts(["public", "code"])
    with pytest.raises(UnknownExpertError):
        model.set_active_experts(["public", "poems"])


def test_a_set_can_be_given_beside_a_configuration_which_stays_as_it_was(tmp_path):
    named_model().save_pretrained(tmp_path)
    config = FlexOlmoConfig.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, config=config, active_experts=["public", "code"])

    assert model.expert_names == ["public", "code"]
    assert config.active_experts is None


def test_a_set_can_be_written_as_one_string_of_names(tmp_path):
    named_model().save_pretrained(tmp_path)

    assert AutoModelForCausalLM.from_pretrained(tmp_path, active_experts="public+news").expert_names == [
        "public",
        "news",
    ]


@pytest.mark.parametrize("change", ["assigned", "in place", "none"])
@torch.no_grad()
def test_a_set_that_is_written_into_the_configuration_is_not_passed_over(input_ids, change, tmp_path):
    model = named_model()
    if change == "none":
        model.set_active_experts(["public", "math"])
        model.config.active_experts = None
    elif change == "assigned":
        model.config.active_experts = ["public"]
    else:
        model.config.active_experts.remove("news")
    shown = model.config.active_experts
    for call in (model, model.model, model.generate, model.attribution):
        with pytest.raises(ConfigurationError, match=re.escape(f"set to {shown} by hand")):
            call(input_ids)
    with pytest.raises(ConfigurationError, match="by hand"):
        model.save_pretrained(tmp_path)
    # Who names the experts in the call says what is meant.
    expected = model(input_ids, active_experts=["public"]).logits
    model.set_active_experts(["public"])
    assert torch.equal(model(input_ids).logits, expected)


@pytest.mark.parametrize("copied", COPIES)
@torch.no_grad()
def test_configurations_that_are_shared_copied_or_replaced_by_equal_ones_are_followed(input_ids, copied):
    config = FlexOlmoConfig(**{**TINY, "num_experts": 4, "expert_names": NAMES})
    first, second = FlexOlmoForCausalLM(config), FlexOlmoForCausalLM(config)
    second.set_active_experts(["public"])
    first(input_ids)
    COPIES[copied](second)(input_ids)
    second.config = second.model.config = FlexOlmoConfig(**json.loads(second.config.to_json_string(use_diff=False)))
    assert type(second.config.active_experts) is list
    second(input_ids)
    first.config.active_experts = None
    first(input_ids)
    second.config = FlexOlmoConfig(**{**TINY, "num_experts": 4, "expert_names": NAMES})
    with pytest.raises(ConfigurationError, match="by hand"):
        second(input_ids)


@pytest.mark.parametrize(
    "use",
    {
        "moved": lambda model, ids: model.to(torch.float32),
        "half": lambda model, ids: model.half(),
        "with": lambda model, ids: model.use_experts("math").__enter__(),
        "removed": lambda model, ids: model.remove_expert("news"),
        "row without a set": lambda model, ids: model(ids[:2], active_experts=[None, ["public"]]),
        "paged": lambda model, ids: model.generate(ids[:1], cache_implementation="paged", max_new_tokens=1),
        "batch": lambda model, ids: model.generate_batch([[5, 6]], max_new_tokens=1),
    }.items(),
    ids=lambda use: use[0],
)
def test_whatever_relies_on_the_set_in_force_refuses_another_in_the_configuration(input_ids, use):
    model = named_model()
    model.config.active_experts = ["public"]
    with pytest.raises(ConfigurationError, match="by hand"):
        use[1](model, input_ids)
    assert model.config.active_experts == ["public"]
    assert model.active_experts == NAMES


@torch.no_grad()
def test_a_set_that_a_model_once_wrote_is_no_excuse(input_ids):
    model, other = named_model(), named_model()
    before = model.config.active_experts
    model.set_active_experts(["public"])
    model.config.active_experts = before
    other.set_active_experts(["math"])
    third = named_model()
    third.config.active_experts = other.config.active_experts
    for one in (model, third):
        with pytest.raises(ConfigurationError, match="by hand"):
            one(input_ids)
    model.config.active_experts.clear()
    with pytest.raises(ConfigurationError, match=r"set_active_experts\(\[\.\.\.\]\)"):
        model(input_ids)


def test_the_configuration_is_written_as_plain_values():
    config = named_model().config
    written = config.to_dict()
    assert type(written["active_experts"]) is list
    assert "_shown_experts" not in {*written, *config.to_diff_dict()}
    assert "_shown_experts" not in config.to_json_string(use_diff=False)
