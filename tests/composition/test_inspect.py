"""Inspecting: what a table says of a checkpoint agrees with the model that loads from it, and no weight is read."""

import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM, inspect_checkpoint, merge_experts
from flexolmo_hf.composition.reader import CheckpointReader
from flexolmo_hf.errors import (
    DamagedFileError,
    FlexOlmoError,
    NonFiniteTensorError,
    NotAPackageError,
    NotFlexOlmoError,
    UnexpectedTensorError,
)
from tests.composition.conftest import VARIANTS, consortium, edit_json, forged
from tests.conftest import stock_model


@pytest.fixture
def merged(two_owners, tmp_path):
    return merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_its_counts_add_up_to_the_model_and_its_bytes_to_the_files(tmp_path, settings):
    owners = consortium(tmp_path, **settings)
    merged = merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    summary, model = inspect_checkpoint(merged), FlexOlmoForCausalLM.from_pretrained(merged)

    assert summary.shared_parameters + sum(e.parameters for e in summary.experts) == model.num_parameters()
    assert summary.shared_bytes + sum(e.bytes for e in summary.experts) == model.num_parameters() * 4


@pytest.mark.parametrize("router_bias", [[], ["math"]], ids=["no bias", "bias"])
def test_an_expert_counts_the_same_in_a_package_and_in_a_model(tmp_path, router_bias):
    owners = consortium(tmp_path, ["math"], router_bias=router_bias)
    merged = merge_experts(owners.anchor, owners.packages, tmp_path / "merged")

    (packed,) = inspect_checkpoint(owners.packages["math"]).experts
    assert inspect_checkpoint(merged).experts[1].parameters == packed.parameters


def test_experts_stand_in_checkpoint_order_with_their_own_files(merged):
    experts = inspect_checkpoint(merged).experts

    assert [(e.name, e.index) for e in experts] == [("public", 0), ("math", 1), ("code", 2)]
    assert [e.files for e in experts] == [[f"model-expert-{e.name}-00001-of-00001.safetensors"] for e in experts]


def test_half_precision_is_half_the_size(two_owners, tmp_path):
    two_owners.models["math"].to(torch.bfloat16).save_pretrained(tmp_path / "half")
    two_owners.models["code"].save_pretrained(tmp_path / "full")
    half, full = (inspect_checkpoint(tmp_path / name).experts[1] for name in ("half", "full"))

    assert (half.parameters, half.bytes * 2) == (full.parameters, full.bytes)


def test_a_model_names_its_kind_and_how_many_experts_a_token_uses(merged, two_owners):
    summary = inspect_checkpoint(merged)
    dense = inspect_checkpoint(two_owners.anchor)

    assert (summary.kind, summary.experts_per_token) == ("FlexOlmo model", 3)
    assert (dense.kind, dense.experts_per_token) == ("dense OLMo-2 model", 1)


def test_a_dense_model_is_its_public_expert(two_owners):
    (public,) = inspect_checkpoint(two_owners.anchor).experts

    assert (public.name, public.index, public.parameters) == ("public", 0, 2 * 3 * 64 * 48)


def test_a_stock_checkpoint_has_experts_with_default_names(tmp_path):
    stock_model().save_pretrained(tmp_path)

    assert [e.name for e in inspect_checkpoint(tmp_path).experts] == ["public", "expert_1", "expert_2", "expert_3"]


def test_the_bias_shown_is_the_one_that_acts(tmp_path):
    model = consortium(tmp_path, ["math"], router_bias=["math"]).models["math"]
    with torch.no_grad():
        for mixture, bias in zip(model.mixtures, (-1.0, 5.0), strict=True):
            mixture.gate.bias[1] = bias
    model.save_pretrained(tmp_path / "saved")

    assert [e.bias for e in inspect_checkpoint(tmp_path / "saved").experts] == [0.0, -0.5]


def test_without_biases_none_is_shown(merged, two_owners):
    assert [e.bias for e in inspect_checkpoint(merged).experts] == [None, None, None]
    assert inspect_checkpoint(two_owners.packages["math"]).experts[0].bias is None


def test_active_is_what_a_plain_load_makes_active(two_owners, tmp_path):
    model = two_owners.models["math"]
    model.set_active_experts(["math"])
    model.save_pretrained(tmp_path / "saved")

    shown = [e.name for e in inspect_checkpoint(tmp_path / "saved").experts if e.active]
    assert shown == FlexOlmoForCausalLM.from_pretrained(tmp_path / "saved").active_experts == ["math"]


def test_a_package_shows_the_anchor_it_belongs_to(two_owners):
    math, code = (inspect_checkpoint(folder) for folder in two_owners.packages.values())

    assert math.kind == "expert package"
    assert (math.experts[0].name, math.experts[0].index) == ("math", None)
    assert math.anchor_digest == code.anchor_digest
    assert len(math.anchor_digest) == 64


def test_no_weight_of_a_model_is_read(merged, monkeypatch):
    def read(self, name):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(CheckpointReader, "tensor", read)
    assert len(inspect_checkpoint(merged).experts) == 3


def test_a_truncated_model_is_refused(merged, refused):
    file = merged / "model-expert-math-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])

    with refused(DamagedFileError, file.name):
        inspect_checkpoint(merged)


def test_a_tampered_package_is_refused(two_owners, refused):
    file = two_owners.packages["math"] / "expert.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")

    with refused(DamagedFileError, file.name):
        inspect_checkpoint(two_owners.packages["math"])


def test_a_diverged_package_is_refused(two_owners, refused):
    diverged = forged(two_owners.packages["math"], lambda tensors: tensors["layers.0.router.row"].fill_(torch.nan))

    with refused(NonFiniteTensorError, "layers.0.router.row"):
        inspect_checkpoint(diverged)


def test_a_broken_manifest_is_refused(two_owners, refused):
    (two_owners.packages["math"] / "manifest.json").write_text("{")

    with refused(NotAPackageError, "package-math"):
        inspect_checkpoint(two_owners.packages["math"])


def test_another_architecture_is_refused(two_owners, refused):
    edit_json(two_owners.anchor / "config.json", lambda config: config.update(model_type="gpt2"))

    with refused(NotFlexOlmoError, "'gpt2'"):
        inspect_checkpoint(two_owners.anchor)


def test_a_checkpoint_with_more_experts_than_it_says_is_refused(merged, refused):
    fewer = {"num_experts": 1, "num_experts_per_tok": 1, "expert_names": ["public"]}
    edit_json(merged / "config.json", lambda config: config.update(fewer))

    with refused(UnexpectedTensorError, "experts.1."):
        inspect_checkpoint(merged)


@pytest.mark.parametrize("place", ["nowhere", "merged/README.md", "."])
def test_a_place_without_a_checkpoint_is_refused(merged, tmp_path, refused, place):
    with refused(FlexOlmoError):
        inspect_checkpoint(tmp_path / place)


def test_a_repository_that_cannot_be_reached_is_refused(refused):
    with refused(FlexOlmoError, "'nobody/nothing'"):
        inspect_checkpoint("nobody/nothing")
