"""Merging equals its parts: bit for bit what each owner trained, whatever the order and the route."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM, freeze_except, merge_experts
from tests.composition.conftest import VARIANTS, consortium, logits, pack, tree
from tests.conftest import stock_model

every_variant = pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
every_stock_variant = pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "router bias"])


def load(folder, *names):
    chosen = {"active_experts": list(names)} if names else {}
    return FlexOlmoForCausalLM.from_pretrained(folder, **chosen)


def same_tensors(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def by_expert_name(model):
    """Return a model's tensors under keys that do not depend on the order of its experts."""
    named = {}
    for key, tensor in model.state_dict().items():
        if ".mlp.gate." in key:
            named |= {f"{key} {name}": tensor[at] for at, name in enumerate(model.expert_names)}
        else:
            named[re.sub(r"(?<=experts\.)\d+", lambda index: model.expert_names[int(index[0])], key)] = tensor
    return named


@every_variant
@pytest.mark.parametrize("name", ["math", "code"])
def test_with_one_expert_active_it_equals_the_model_that_expert_was_trained_in(tmp_path, input_ids, settings, name):
    owners = consortium(tmp_path, **settings)
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")

    merged = load(tmp_path / "merged", "public", name)
    assert torch.equal(logits(merged, input_ids), logits(owners.models[name], input_ids))


@every_variant
def test_with_public_alone_it_equals_the_public_model(tmp_path, input_ids, settings):
    owners = consortium(tmp_path, **settings)
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    public = FlexOlmoForCausalLM.from_dense(owners.anchor)

    assert torch.equal(logits(load(tmp_path / "merged", "public"), input_ids), logits(public, input_ids))


@every_variant
def test_left_out_at_load_or_live_or_before_merging_gives_the_same_bits(tmp_path, input_ids, settings):
    owners = consortium(tmp_path, ["math", "code", "news"], **settings)
    merge_experts(owners.anchor, owners.packages, tmp_path / "all")
    merge_experts(owners.anchor, {n: owners.packages[n] for n in ("math", "news")}, tmp_path / "without code")
    live = load(tmp_path / "all")
    with_code = logits(live, input_ids)
    live.set_active_experts(["public", "math", "news"])

    never_merged = logits(load(tmp_path / "without code"), input_ids)
    assert torch.equal(logits(load(tmp_path / "all", "public", "math", "news"), input_ids), never_merged)
    assert torch.equal(logits(live, input_ids), never_merged)
    assert not torch.equal(with_code, never_merged)


@every_variant
def test_order_of_arrival_changes_nothing_but_the_order_of_experts(tmp_path, input_ids, settings):
    owners = consortium(tmp_path, ["math", "code", "news"], **settings)
    orders = ["math", "code", "news"], ["news", "math", "code"]
    for order in orders:
        merge_experts(owners.anchor, {name: owners.packages[name] for name in order}, tmp_path / order[0])
    one, other = (load(tmp_path / order[0]) for order in orders)

    assert [one.expert_names, other.expert_names] == [["public", *order] for order in orders]
    assert same_tensors(by_expert_name(one), by_expert_name(other))
    torch.testing.assert_close(logits(one, input_ids), logits(other, input_ids), atol=1e-5, rtol=0)


@every_variant
def test_one_by_one_equals_all_at_once(tmp_path, settings):
    owners = consortium(tmp_path, **settings)
    merge_experts(owners.anchor, owners.packages, tmp_path / "at once")
    merge_experts(owners.anchor, {"math": owners.packages["math"]}, tmp_path / "first")
    merge_experts(tmp_path / "first", {"code": owners.packages["code"]}, tmp_path / "second")

    at_once, one_by_one = tree(tmp_path / "at once"), tree(tmp_path / "second")
    # The second merge cannot know what the card of the first one said.
    card = Path("README.md")
    assert at_once.pop(card) and one_by_one.pop(card)
    assert at_once == one_by_one


@every_variant
def test_experts_that_the_anchor_already_holds_are_kept(tmp_path, input_ids, settings):
    owners = consortium(tmp_path, **settings)
    owners.models["math"].save_pretrained(tmp_path / "with math")
    merge_experts(tmp_path / "with math", {"code": owners.packages["code"]}, tmp_path / "merged")

    assert load(tmp_path / "merged").expert_names == ["public", "math", "code"]
    for name, model in owners.models.items():
        assert torch.equal(logits(load(tmp_path / "merged", "public", name), input_ids), logits(model, input_ids))


def test_all_experts_are_active_though_the_anchor_was_saved_with_some_switched_off(two_owners, tmp_path):
    two_owners.models["math"].set_active_experts(["public"])
    two_owners.models["math"].save_pretrained(tmp_path / "with math off")
    merge_experts(tmp_path / "with math off", {"code": two_owners.packages["code"]}, tmp_path / "merged")

    assert load(tmp_path / "merged").active_experts == ["public", "math", "code"]


@pytest.mark.parametrize("biased", ["math", "code"])
def test_an_expert_trained_without_a_bias_has_none_beside_one_that_has(tmp_path, input_ids, biased):
    owners = consortium(tmp_path, router_bias=[biased])
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")

    for name, model in owners.models.items():
        assert torch.equal(logits(load(tmp_path / "merged", "public", name), input_ids), logits(model, input_ids))


def test_an_expert_taken_out_of_a_released_checkpoint_and_merged_back_gives_that_checkpoint(tmp_path):
    stock_model().save_pretrained(tmp_path / "released")
    released = load(tmp_path / "released")
    load(tmp_path / "released", "public", "expert_1", "expert_3").save_pretrained(tmp_path / "three")
    merge_experts(tmp_path / "three", {"expert_2": ExpertPackage.from_model(released, "expert_2")}, tmp_path / "merged")

    assert same_tensors(by_expert_name(load(tmp_path / "merged")), by_expert_name(released))


@pytest.mark.parametrize("router_bias", [[], ["math"]], ids=["no bias", "bias"])
def test_packed_after_two_steps_it_equals_the_model_still_in_training(tmp_path, input_ids, router_bias):
    owners = consortium(tmp_path, ["math"], router_bias=router_bias)
    model = owners.models["math"]
    before = logits(model, input_ids)
    freeze_except(model, "math")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        optimizer.step()
    merge_experts(owners.anchor, {"math": pack(model, "math", tmp_path / "trained")}, tmp_path / "merged")

    after = logits(model, input_ids)
    assert torch.equal(logits(load(tmp_path / "merged"), input_ids), after)
    assert not torch.equal(before, after)


def test_an_expert_takes_the_name_it_is_merged_under(one_owner, tmp_path, input_ids):
    merge_experts(one_owner.anchor, {"algebra": one_owner.packages["math"]}, tmp_path / "merged")

    merged = load(tmp_path / "merged", "public", "algebra")
    assert torch.equal(logits(merged, input_ids), logits(one_owner.models["math"], input_ids))


def test_a_package_in_memory_merges_like_its_folder(one_owner, tmp_path):
    in_memory = ExpertPackage.from_model(one_owner.models["math"], "math")
    merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "from folder")
    merge_experts(str(one_owner.anchor), {"math": in_memory}, tmp_path / "from memory")

    assert same_tensors(load(tmp_path / "from folder").state_dict(), load(tmp_path / "from memory").state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_stays_half_precision_bit_for_bit(one_owner, tmp_path, input_ids, dtype):
    one_owner.models["math"].to(dtype).save_pretrained(tmp_path / "both")
    load(tmp_path / "both", "public").save_pretrained(tmp_path / "public")
    half = load(tmp_path / "both")
    merge_experts(tmp_path / "public", {"math": pack(half, "math", tmp_path / "package")}, tmp_path / "merged")

    stored = [load_file(file) for file in (tmp_path / "merged").glob("*.safetensors")]
    assert {tensor.dtype for tensors in stored for tensor in tensors.values()} == {dtype}
    assert load(tmp_path / "merged").dtype == dtype
    assert torch.equal(logits(load(tmp_path / "merged"), input_ids), logits(half, input_ids))


@every_stock_variant
@pytest.mark.parametrize("per_token", [None, 2], ids=["all experts", "best two"])
def test_stock_transformers_loads_it_whole_and_computes_the_same(tmp_path, input_ids, variant, per_token):
    owners = consortium(tmp_path, **VARIANTS[variant])
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged", num_experts_per_tok=per_token)
    stock, report = StockModel.from_pretrained(tmp_path / "merged", output_loading_info=True)

    ours = load(tmp_path / "merged")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(stock, input_ids), logits(ours, input_ids), atol=1e-5, rtol=0)


def test_merged_without_its_biases_a_model_loads_whole_in_stock_transformers(tmp_path, input_ids):
    owners = consortium(tmp_path, router_bias=["math", "code"])
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged", router_bias=False)
    stock, report = StockModel.from_pretrained(tmp_path / "merged", output_loading_info=True)

    ours = load(tmp_path / "merged")
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(stock, input_ids), logits(ours, input_ids), atol=1e-5, rtol=0)


def test_each_token_uses_all_experts_unless_told_otherwise(two_owners, tmp_path):
    merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "all")
    merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "one", num_experts_per_tok=1)

    assert [load(tmp_path / name).config.num_experts_per_tok for name in ("all", "one")] == [3, 1]
