"""A tuned router can be taken back, bit for bit, and nothing tuned goes where it does not belong."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel
from typer.testing import CliRunner

from flexolmo_hf import (
    ExpertPackage,
    FlexOlmoForCausalLM,
    describe_router,
    export_checkpoint,
    merge_experts,
    rollback_router,
)
from flexolmo_hf.cli import app
from flexolmo_hf.composition.router_base import complete_base
from flexolmo_hf.errors import (
    AnchorMismatchError,
    ConfigurationError,
    DamagedFileError,
    NotFlexOlmoError,
    UnknownExpertError,
)
from flexolmo_hf.modeling.files.router_base import BASE_RECORD, BASE_WEIGHTS, current_router, read_router_base
from tests.composition.conftest import consortium, edit_json, edit_weights, logits, tree

NAMES = ["public", "math", "code"]


def load(folder, *names):
    return FlexOlmoForCausalLM.from_pretrained(folder, **({"active_experts": list(names)} if names else {}))


def tune(model, proxies, *, public_row=True):
    """Move what tuning moves, and keep what was before, as the trainer does."""
    model.router_base = replace(complete_base(model), proxies=proxies, steps=7, tokens=900)
    with torch.no_grad():
        for mixture in model.mixtures:
            shift = torch.randn_like(mixture.gate.weight)
            shift[0] *= public_row
            mixture.gate.weight.add_(shift)
            if mixture.gate.bias is not None:
                mixture.gate.bias[1:] -= 0.5
    return model


@pytest.fixture(params=[["math", "code"], []], ids=["biases", "no biases"])
def owners(tmp_path, request):
    """Owners of math and code, `merged`, and `tuned` on the proxies of math."""
    made = consortium(tmp_path, router_bias=request.param)
    merge_experts(made.anchor, made.packages, tmp_path / "merged")
    tune(load(tmp_path / "merged"), ["math"]).save_pretrained(tmp_path / "tuned")
    return made


def same(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same_base(one, other, names=NAMES):
    rows = all(torch.equal(one.rows[name], other.rows[name]) for name in names)
    return rows and all(torch.equal(one.biases[name], other.biases[name]) for name in names if name in other.biases)


# Taking it back.


@pytest.mark.parametrize("owner", [None, "math"])
def test_rolled_back_a_checkpoint_is_the_one_before_tuning_bit_for_bit(owners, tmp_path, input_ids, owner):
    rollback_router(tmp_path / "tuned", tmp_path / "back", owner=owner)
    before, back = load(tmp_path / "merged"), load(tmp_path / "back")

    assert same(before, back)
    assert back.config.to_dict().keys() == before.config.to_dict().keys()
    assert torch.equal(logits(before, input_ids), logits(back, input_ids))
    assert not torch.equal(logits(before, input_ids), logits(load(tmp_path / "tuned"), input_ids))


def test_nothing_of_the_tuned_rows_is_left(owners, tmp_path):
    rollback_router(tmp_path / "tuned", tmp_path / "back")
    names = {path.name for path in (tmp_path / "back").iterdir()}

    assert not names & {BASE_RECORD, BASE_WEIGHTS}
    assert load(tmp_path / "back").router_base is None
    with pytest.raises(ConfigurationError, match="nothing to roll back"):
        rollback_router(tmp_path / "back", tmp_path / "again")


def test_tokenizer_card_and_set_in_force_go_along(owners, tmp_path, tokenizer):
    model = load(tmp_path / "tuned")
    model.set_active_experts(["public", "code"])
    model.save_pretrained(tmp_path / "set")
    tokenizer.save_pretrained(tmp_path / "set")
    shutil.copy(tmp_path / "merged" / "README.md", tmp_path / "set")
    rollback_router(tmp_path / "set", tmp_path / "back")

    assert load(tmp_path / "back").active_experts == ["public", "code"]
    assert {"tokenizer.json", "README.md"} <= {path.name for path in (tmp_path / "back").iterdir()}


def test_the_rollback_of_a_rounded_model_is_that_of_the_rounded_rows(owners, tmp_path):
    load(tmp_path / "tuned").to(torch.bfloat16).save_pretrained(tmp_path / "rounded")
    rollback_router(tmp_path / "rounded", tmp_path / "back")

    assert same(load(tmp_path / "back"), load(tmp_path / "merged").to(torch.bfloat16))


@pytest.mark.parametrize(
    ("owner", "error", "says"),
    [
        ("code", ConfigurationError, "No proxies for 'code' were used"),
        ("public", ConfigurationError, "No proxies for 'public'"),
        ("maht", UnknownExpertError, "Did you mean 'math'?"),
    ],
)
def test_an_owner_whose_proxies_were_not_used_has_nothing_to_take_back(owners, tmp_path, refused, owner, error, says):
    with refused(error, says):
        rollback_router(tmp_path / "tuned", tmp_path / "back", owner=owner)


def test_an_owner_whose_expert_has_left_can_still_have_it_taken_back(owners, tmp_path):
    load(tmp_path / "tuned", "public", "code").save_pretrained(tmp_path / "without")
    rollback_router(tmp_path / "without", tmp_path / "back", owner="math")

    assert same(load(tmp_path / "back"), load_anew(tmp_path, "public", "code"))


def load_anew(tmp_path, *names):
    """Load a part of the model before tuning as a checkpoint of its own."""
    load(tmp_path / "merged", *names).save_pretrained(tmp_path / "part")
    return load(tmp_path / "part")


def test_a_dense_model_and_one_that_was_never_tuned_are_refused(owners, tmp_path, refused):
    with refused(NotFlexOlmoError, "'olmo2'"):
        rollback_router(owners.anchor, tmp_path / "back")
    with refused(ConfigurationError, "nothing to roll back"):
        rollback_router(tmp_path / "merged", tmp_path / "back")


DAMAGES = {
    "weights that are missing": lambda folder: (folder / BASE_WEIGHTS).unlink(),
    "truncated weights": lambda folder: (folder / BASE_WEIGHTS).write_bytes((folder / BASE_WEIGHTS).read_bytes()[:-8]),
    "other weights": lambda folder: edit_weights(
        folder / BASE_WEIGHTS, lambda tensors: tensors["math.rows"].add_(1e-3)
    ),
    "a record that is no JSON": lambda folder: (folder / BASE_RECORD).write_text("{"),
    "a record of another version": lambda folder: edit_json(folder / BASE_RECORD, lambda r: r.update(version=2)),
    "a record without owners": lambda folder: edit_json(folder / BASE_RECORD, lambda r: r.pop("proxies")),
    "an expert that is not there": lambda folder: edit_json(folder / BASE_RECORD, lambda r: r["experts"].append("no")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_what_cannot_be_trusted_is_refused_and_nothing_is_written(owners, tmp_path, refused, damage):
    damage(tmp_path / "tuned")
    with refused(DamagedFileError, "router_base."):
        rollback_router(tmp_path / "tuned", tmp_path / "back")


def test_rows_of_another_model_are_refused(owners, tmp_path, refused):
    other = consortium(tmp_path / "other", hidden_size=32)
    merge_experts(other.anchor, other.packages, tmp_path / "small")
    for name in (BASE_RECORD, BASE_WEIGHTS):
        shutil.copy(tmp_path / "tuned" / name, tmp_path / "small")
    with refused(DamagedFileError, "does not fit"):
        rollback_router(tmp_path / "small", tmp_path / "back")


# Where the former rows go, and where not.


def test_a_model_that_is_loaded_and_saved_keeps_its_former_rows(owners, tmp_path):
    base = read_router_base(tmp_path / "tuned")
    load(tmp_path / "tuned").save_pretrained(tmp_path / "copy")
    copied = read_router_base(tmp_path / "copy")

    assert same_base(copied, base)
    assert (copied.proxies, copied.steps, copied.tokens) == (["math"], 7, 900)


def test_a_part_of_a_model_keeps_the_former_rows_of_its_experts_and_reads_no_others(owners, tmp_path):
    part = load(tmp_path / "tuned", "public", "code")
    assert set(part.router_base.rows) == {"public", "code"}
    part.save_pretrained(tmp_path / "part")

    assert json.loads((tmp_path / "part" / BASE_RECORD).read_text())["experts"] == ["public", "code"]
    assert read_router_base(tmp_path / "part").proxies == ["math"]


def test_an_untuned_model_that_is_saved_over_a_tuned_one_leaves_no_former_rows_there(owners, tmp_path):
    load(tmp_path / "merged").save_pretrained(tmp_path / "tuned")

    assert read_router_base(tmp_path / "tuned") is None
    assert not (tmp_path / "tuned" / BASE_WEIGHTS).exists()


def test_an_expert_that_is_loaded_later_brings_its_former_row(owners, tmp_path):
    live = load(tmp_path / "tuned", "public", "code")
    live.load_expert("math")
    live.save_pretrained(tmp_path / "whole")
    rollback_router(tmp_path / "whole", tmp_path / "back")

    assert same(load(tmp_path / "back"), load(tmp_path / "merged"))


def test_a_package_added_under_the_name_of_an_expert_that_left_has_no_former_row(tmp_path):
    owners = consortium(tmp_path)
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    live = tune(load(tmp_path / "merged"), ["math"], public_row=False)
    live.remove_expert("math")
    live.add_expert(owners.packages["code"], "math")

    assert set(live.router_base.rows) == {"public", "code"}


def test_an_export_has_no_former_rows_and_stock_transformers_reads_the_tuned_ones(owners, tmp_path, input_ids):
    tuned = load(tmp_path / "tuned")
    export_checkpoint(tmp_path / "tuned", tmp_path / "stock", drop_bias=tuned.config.router_bias)
    assert not {path.name for path in (tmp_path / "stock").iterdir()} & {BASE_RECORD, BASE_WEIGHTS}
    if not tuned.config.router_bias:
        torch.testing.assert_close(
            logits(StockModel.from_pretrained(tmp_path / "stock"), input_ids), logits(tuned, input_ids)
        )
        whole, report = StockModel.from_pretrained(tmp_path / "tuned", output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        torch.testing.assert_close(logits(whole, input_ids), logits(tuned, input_ids))


def test_a_package_fits_no_model_whose_public_row_was_tuned_and_the_error_names_it(tmp_path, refused):
    owners = consortium(tmp_path, ["math", "code", "news"])
    news = owners.packages.pop("news")
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    tune(load(tmp_path / "merged"), ["math"]).save_pretrained(tmp_path / "tuned")
    with refused(AnchorMismatchError, "gate.public_row"):
        merge_experts(tmp_path / "tuned", {"news": news}, tmp_path / "out")


@pytest.mark.parametrize("biased", [[], ["news"], ["math", "code", "news"]], ids="+".join)
def test_merged_onto_a_model_whose_public_row_was_held_it_can_still_be_rolled_back(tmp_path, biased):
    owners = consortium(tmp_path, ["math", "code", "news"], router_bias=biased)
    merge_experts(owners.anchor, owners.packages, tmp_path / "expected")
    news = owners.packages.pop("news")
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    tune(load(tmp_path / "merged"), ["math"], public_row=False).save_pretrained(tmp_path / "tuned")
    merge_experts(tmp_path / "tuned", {"news": news}, tmp_path / "more")
    rollback_router(tmp_path / "more", tmp_path / "back")

    assert same(load(tmp_path / "back"), load(tmp_path / "expected"))


def test_no_tuned_row_gets_into_a_package(owners, tmp_path):
    for model in (load(tmp_path / "tuned"), load(tmp_path / "tuned", "public", "math")):
        with pytest.raises(ConfigurationError, match="Roll the router back first"):
            ExpertPackage.from_model(model, "math")
    rollback_router(tmp_path / "tuned", tmp_path / "back")
    again = ExpertPackage.from_model(load(tmp_path / "back"), "math")
    package = ExpertPackage.from_pretrained(owners.packages["math"])

    assert again.manifest.anchor == package.manifest.anchor
    assert all(torch.equal(tensor, package.tensors[key]) for key, tensor in again.tensors.items())


def test_merged_without_biases_a_model_computes_what_one_without_them_does(tmp_path, input_ids):
    owners = consortium(tmp_path, router_bias=["math", "code"])
    merge_experts(owners.anchor, owners.packages, tmp_path / "with")
    merge_experts(owners.anchor, owners.packages, tmp_path / "without", router_bias=False)
    cleared = load(tmp_path / "with")
    for mixture in cleared.mixtures:
        mixture.gate.bias.data.zero_()

    assert not load(tmp_path / "without").config.router_bias
    torch.testing.assert_close(logits(load(tmp_path / "without"), input_ids), logits(cleared, input_ids))
    assert not torch.allclose(logits(cleared, input_ids), logits(load(tmp_path / "with"), input_ids))


# Looking at it.


def test_a_description_has_cosines_biases_and_owners(tmp_path):
    owners = consortium(tmp_path, router_bias=["math", "code"])
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    model = load(tmp_path / "merged")
    before = current_router(model)
    tune(model, ["math"]).save_pretrained(tmp_path / "tuned")
    found = describe_router(tmp_path / "tuned")

    assert (found.tuned, found.proxies, found.steps, found.tokens) == (True, ["math"], 7, 900)
    assert [expert.proxies for expert in found.experts] == [False, True, False]
    for expert in found.experts:
        now = current_router(model)
        cosine = torch.nn.functional.cosine_similarity(before.rows[expert.name], now.rows[expert.name]).mean()
        assert expert.cosine == pytest.approx(cosine.item())
        assert expert.bias == pytest.approx(now.biases[expert.name].mean().item())
        assert expert.base_bias == pytest.approx(before.biases[expert.name].mean().item())


def test_an_untuned_router_has_biases_to_show_and_no_cosines(owners, tmp_path):
    found = describe_router(tmp_path / "merged")

    assert not found.tuned
    assert [expert.cosine for expert in found.experts] == [None] * 3
    assert all((expert.bias is not None) == load(tmp_path / "merged").config.router_bias for expert in found.experts)


# The command.


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def test_the_command_shows_and_rolls_back(owners, tmp_path):
    shown = run("router", tmp_path / "tuned")
    assert shown.exit_code == 0, shown.output
    assert "with proxies for math" in shown.stdout
    assert "never tuned" in run("router", tmp_path / "merged").stdout
    done = run("router", tmp_path / "tuned", tmp_path / "back", "--rollback", "--owner", "math")
    rollback_router(tmp_path / "tuned", tmp_path / "expected")

    assert done.exit_code == 0, done.output
    assert tree(tmp_path / "back") == tree(tmp_path / "expected")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["tuned", "back"], "go together"),
        (["tuned", "--rollback"], "go together"),
        (["tuned", "--owner", "math"], "--owner"),
        (["merged", "back", "--rollback"], "nothing to roll back"),
        (["tuned", "back", "--rollback", "--owner", "code"], "No proxies for 'code'"),
        (["tuned", "merged", "--rollback"], "not empty"),
        (["anchor"], "'olmo2'"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_a_misuse_ends_with_code_2_and_one_sentence_and_writes_nothing(owners, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    result = run("router", *arguments)

    assert result.exit_code == 2, repr(result.exception)
    assert says in result.stderr
    assert "Traceback" not in result.output
    assert tree(tmp_path) == before
