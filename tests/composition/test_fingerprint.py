"""Fingerprints: equal for the same anchor however it is held, different for any other."""

import copy

import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.composition.fingerprint import (
    ANCHOR_SETTINGS,
    AnchorFingerprint,
    anchor_settings,
    fingerprint_anchor,
    hash_tensor,
    is_anchor_tensor,
)
from flexolmo_hf.composition.reader import CheckpointReader
from tests.composition.conftest import VARIANTS, consortium, move_expert, one_ulp_up


def fingerprint(model, **replaced):
    """Fingerprint a model in memory, some of whose tensors are replaced."""
    state = {**model.state_dict(), **replaced}
    rows = {layer: state[f"model.layers.{layer}.mlp.gate.weight"][0] for layer in range(len(model.mixtures))}
    return fingerprint_anchor(model.config, state, state.__getitem__, rows)


@pytest.fixture
def model(one_owner):
    return one_owner.models["math"]


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_all_owners_have_the_anchor_of_the_dense_model_on_disk(tmp_path, settings):
    owners = consortium(tmp_path, **settings)
    model = owners.models["math"]
    rows = {layer: mixture.gate.weight[0] for layer, mixture in enumerate(model.mixtures)}
    dense = CheckpointReader(owners.anchor)

    assert fingerprint(model) == fingerprint(owners.models["code"])
    assert fingerprint(model) == fingerprint_anchor(dense.config, dense.file_of, dense.tensor, rows)


def test_a_model_that_was_saved_and_loaded_has_the_same_anchor(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")

    for experts in (None, ["public"]):
        loaded = FlexOlmoForCausalLM.from_pretrained(tmp_path / "saved", active_experts=experts)
        assert fingerprint(loaded).digest == fingerprint(model).digest


def test_every_shared_number_counts_to_its_last_bit(model):
    anchor = fingerprint(model)
    shared = [key for key in model.state_dict() if ".mlp.gate." not in key and ".experts.1." not in key]

    assert len(shared) == len(anchor.tensors) - len(model.mixtures)
    for key in shared:
        other = fingerprint(model, **{key: one_ulp_up(model.state_dict()[key])})
        assert anchor.differing_tensors(other) == [key]
        assert anchor.digest != other.digest


def test_the_public_router_row_counts(model):
    gate = "model.layers.1.mlp.gate.weight"
    other = fingerprint(model, **{gate: one_ulp_up(model.state_dict()[gate])})

    assert fingerprint(model).differing_tensors(other) == ["model.layers.1.mlp.gate.public_row"]


@pytest.mark.parametrize("router_bias", [[], ["math"]], ids=["no bias", "bias"])
def test_what_training_moves_does_not_count(tmp_path, router_bias):
    model = consortium(tmp_path, ["math"], router_bias=router_bias).models["math"]
    before = fingerprint(model)
    move_expert(model, "math")
    for mixture in model.mixtures:
        mixture.gate.weight.data[1].add_(1)

    assert fingerprint(model) == before


@pytest.mark.parametrize("setting", ANCHOR_SETTINGS)
def test_every_setting_that_changes_the_computation_counts(model, setting):
    anchor = fingerprint(model)
    changed = copy.deepcopy(anchor.settings)
    changed[setting] = "another value"
    other = AnchorFingerprint(changed, anchor.tensors)

    assert setting in anchor.settings
    assert anchor.digest != other.digest
    assert anchor.differing_settings(other) == [f"{setting} {anchor.settings[setting]!r} instead of 'another value'"]


@pytest.mark.parametrize(
    "setting", ["num_experts_per_tok", "router_aux_loss_coef", "use_cache", "output_router_logits"]
)
def test_settings_of_the_use_do_not_count(setting):
    assert setting not in ANCHOR_SETTINGS


def test_rope_scaling_counts(model):
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_type": "linear", "factor": 2.0}

    assert anchor_settings(config) != anchor_settings(model.config)


def test_a_hash_knows_dtype_and_shape_of_the_same_bytes():
    zeros = torch.zeros(4, 4)
    same_bytes = [zeros, zeros.view(2, 8), zeros.view(torch.int32), zeros.view(torch.bfloat16)]

    assert len({hash_tensor(tensor) for tensor in same_bytes}) == len(same_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_hash_does_not_depend_on_the_layout_in_memory(dtype):
    tensor = torch.randn(6, 4).to(dtype)

    assert hash_tensor(tensor) == hash_tensor(tensor.t().contiguous().t())
    assert hash_tensor(tensor) != hash_tensor(one_ulp_up(tensor))


def test_signed_zeros_are_different_bits():
    assert hash_tensor(torch.tensor([0.0])) != hash_tensor(torch.tensor([-0.0]))


def test_the_router_is_told_from_the_gate_projection_and_expert_1_from_expert_10(model):
    layer = "model.layers.0.mlp"
    kept = {
        f"{layer}.experts.0.gate_proj.weight": True,
        f"{layer}.experts.1.gate_proj.weight": False,
        f"{layer}.experts.10.gate_proj.weight": False,
        f"{layer}.gate.weight": False,
        f"{layer}.gate.bias": False,
        "model.layers.0.self_attn.q_proj.weight": True,
    }

    assert {name: is_anchor_tensor(name, model.config) for name in kept} == kept
