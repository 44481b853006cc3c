"""What merging refuses, before it writes anything."""

import json

import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM, merge_experts
from flexolmo_hf.composition import merge
from flexolmo_hf.errors import (
    AnchorMismatchError,
    ConfigurationError,
    DamagedFileError,
    DuplicateExpertError,
    EmptyExpertSetError,
    FlexOlmoError,
    IncompleteCheckpointError,
    InvalidExpertNameError,
    NonFiniteTensorError,
    NotFlexOlmoError,
    OutputFolderNotEmptyError,
    UnexpectedTensorError,
)
from tests.composition.conftest import consortium, edit_json, edit_weights, one_ulp_up, pack

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
MATHS_OWN = "model.layers.1.mlp.experts.1.up_proj.weight"

BAD_NAMES = [
    "a/b",
    "a\\b",
    "/",
    "..",
    ".hidden",
    "-flag",
    "",
    " ",
    "two words",
    "tab\t",
    "line\n",
    "mäth",
    "数学",
    "a" * 65,
]


@pytest.fixture
def released(two_owners, tmp_path):
    """A FlexOlmo checkpoint that holds the expert math and can take code."""
    two_owners.models["math"].save_pretrained(tmp_path / "released")
    return tmp_path / "released"


@pytest.fixture
def code(two_owners):
    return {"code": two_owners.packages["code"]}


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.1.self_attn.k_norm.weight", "model.layers.1.self_attn.k_norm.weight"),
        ("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.experts.0.gate_proj.weight"),
    ],
)
def test_one_ulp_in_one_shared_number_makes_another_anchor(one_owner, tmp_path, refused, changed, named):
    edit_weights(one_owner.anchor / WEIGHTS, lambda tensors: tensors.update({changed: one_ulp_up(tensors[changed])}))

    with refused(AnchorMismatchError, "'math'", f"(1 shared tensor(s) that differ: {named})"):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


def test_another_setting_makes_another_anchor(one_owner, tmp_path, refused):
    edit_json(one_owner.anchor / CONFIG, lambda config: config.update(rms_norm_eps=2e-5))

    with refused(AnchorMismatchError, "'math'", "(settings that differ: rms_norm_eps 1e-05 instead of 2e-05)"):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


def test_another_public_row_makes_another_anchor(released, code, tmp_path, refused):
    gate = "model.layers.1.mlp.gate.weight"
    edit_weights(released / WEIGHTS, lambda tensors: tensors.update({gate: one_ulp_up(tensors[gate])}))

    with refused(AnchorMismatchError, "'code'", "(1 shared tensor(s) that differ: model.layers.1.mlp.gate.public_row)"):
        merge_experts(released, code, tmp_path / "merged")


def test_experts_trained_against_different_public_rows_do_not_meet_on_a_dense_anchor(one_owner, tmp_path, refused):
    rows = {"public": torch.randn(64)}
    other = FlexOlmoForCausalLM.from_dense(one_owner.anchor, expert="code", router_embeddings=rows)
    packages = {**one_owner.packages, "code": pack(other, "code", tmp_path / "other")}

    with refused(AnchorMismatchError, "'code'", "2 shared tensor(s)", "model.layers.0.mlp.gate.public_row"):
        merge_experts(one_owner.anchor, packages, tmp_path / "merged")


def test_the_anchor_in_another_dtype_is_another_anchor(one_owner, tmp_path, refused):
    half = FlexOlmoForCausalLM.from_dense(one_owner.anchor, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")

    with refused(AnchorMismatchError, "'math'", "lm_head.weight", "in the same dtype"):
        merge_experts(tmp_path / "half", one_owner.packages, tmp_path / "merged")


def test_a_model_of_another_size_is_another_anchor(one_owner, tmp_path, refused):
    other = consortium(tmp_path / "other", ["code"], num_hidden_layers=1)

    with refused(AnchorMismatchError, "'code'", "num_hidden_layers 1 instead of 2"):
        merge_experts(one_owner.anchor, {**one_owner.packages, **other.packages}, tmp_path / "merged")


def no_folder_is_made(*args, **kwargs):
    raise AssertionError("a folder was made")


def test_a_foreign_package_is_refused_before_a_folder_is_made(one_owner, tmp_path, monkeypatch):
    edit_json(one_owner.anchor / CONFIG, lambda config: config.update(rms_norm_eps=2e-5))
    monkeypatch.setattr(merge, "new_folder", no_folder_is_made)

    with pytest.raises(AnchorMismatchError):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


@pytest.mark.parametrize("name", [*BAD_NAMES, 1, None])
def test_a_name_that_is_no_plain_identifier_is_refused(one_owner, tmp_path, refused, name):
    with refused(InvalidExpertNameError, repr(name), "1 to 64"):
        merge_experts(one_owner.anchor, {name: one_owner.packages["math"]}, tmp_path / "merged")


@pytest.mark.parametrize("name", ["a" * 64, "_", "v1.2-final", "7"])
def test_a_plain_identifier_is_a_name(one_owner, tmp_path, name):
    merged = merge_experts(one_owner.anchor, {name: one_owner.packages["math"]}, tmp_path / "merged")

    assert FlexOlmoForCausalLM.from_pretrained(merged).expert_names == ["public", name]


@pytest.mark.parametrize("names", [["public"], ["Public"], ["math"], ["MATH"], ["code", "Code"]], ids="+".join)
def test_a_name_that_is_taken_is_refused_whatever_its_case(released, code, tmp_path, refused, names):
    with refused(DuplicateExpertError, repr(names[-1]), "upper and lower case"):
        merge_experts(released, dict.fromkeys(names, code["code"]), tmp_path / "merged")


def test_merging_nothing_is_refused(one_owner, tmp_path, refused):
    with refused(EmptyExpertSetError):
        merge_experts(one_owner.anchor, {}, tmp_path / "merged")


@pytest.mark.parametrize("per_token", [0, -1, 3])
def test_a_number_of_experts_per_token_that_cannot_be_is_refused(one_owner, tmp_path, refused, per_token):
    with refused(ConfigurationError, f"num_experts_per_tok is {per_token}"):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged", num_experts_per_tok=per_token)


@pytest.mark.parametrize("taken_by", ["merged/notes.txt", "merged/.hidden", "merged/folder/file", "merged"])
def test_an_output_that_is_taken_is_refused(one_owner, tmp_path, refused, taken_by):
    (tmp_path / taken_by).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken_by).write_text("mine")

    with refused(OutputFolderNotEmptyError, "'merged'"):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


def test_an_anchor_of_another_architecture_is_refused(one_owner, tmp_path, refused):
    edit_json(one_owner.anchor / CONFIG, lambda config: config.update(model_type="llama"))

    with refused(NotFlexOlmoError, "'llama'", "'flex_olmo'"):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


@pytest.mark.parametrize(
    "config", ["{", "{}", '{"model_type": "unheard_of"}', "[1]", '{"model_type": "olmo2", "hidden_size": "wide"}']
)
def test_an_anchor_whose_settings_cannot_be_read_is_refused(one_owner, tmp_path, refused, config):
    (one_owner.anchor / CONFIG).write_text(config)

    with refused(FlexOlmoError):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


def test_an_anchor_without_settings_is_refused(one_owner, tmp_path, refused):
    (one_owner.anchor / CONFIG).unlink()

    with refused(FlexOlmoError):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


def test_an_anchor_that_does_not_exist_is_refused(one_owner, tmp_path, refused):
    with refused(FlexOlmoError, "'no such anchor'"):
        merge_experts(tmp_path / "no such anchor", one_owner.packages, tmp_path / "merged")


def test_an_anchor_whose_first_expert_is_not_public_is_refused(released, code, tmp_path, refused):
    edit_json(released / CONFIG, lambda config: config.update(expert_names=["math", "public"]))

    with refused(ConfigurationError, "'math'", "'public'"):
        merge_experts(released, code, tmp_path / "merged")


def test_an_anchor_with_pickled_weights_alone_is_refused(one_owner, tmp_path, refused):
    (one_owner.anchor / WEIGHTS).rename(one_owner.anchor / "pytorch_model.bin")

    with refused(DamagedFileError, WEIGHTS):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_truncated_anchor_is_refused(one_owner, tmp_path, refused, kept):
    content = (one_owner.anchor / WEIGHTS).read_bytes()
    (one_owner.anchor / WEIGHTS).write_bytes(content[:kept])

    with refused(DamagedFileError, WEIGHTS):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_kept_expert_that_is_not_finite_is_refused(released, code, tmp_path, refused, value):
    edit_weights(released / WEIGHTS, lambda tensors: tensors[MATHS_OWN][0].fill_(value))

    with refused(NonFiniteTensorError, MATHS_OWN, "anchor"):
        merge_experts(released, code, tmp_path / "merged")


@pytest.mark.parametrize("missing", [MATHS_OWN, "model.layers.0.mlp.gate.weight"])
def test_an_anchor_that_lacks_a_tensor_is_refused(released, code, tmp_path, refused, missing):
    edit_weights(released / WEIGHTS, lambda tensors: tensors.pop(missing))

    with refused(IncompleteCheckpointError, missing):
        merge_experts(released, code, tmp_path / "merged")


@pytest.mark.parametrize("misshapen", [MATHS_OWN, "model.layers.0.mlp.gate.weight"])
def test_an_anchor_with_a_tensor_of_another_shape_is_refused(released, code, tmp_path, refused, misshapen):
    edit_weights(released / WEIGHTS, lambda tensors: tensors.update({misshapen: tensors[misshapen][:-1]}))

    with refused(FlexOlmoError, misshapen):
        merge_experts(released, code, tmp_path / "merged")


def test_an_anchor_that_holds_more_experts_than_it_says_is_refused(released, code, tmp_path, refused):
    fewer = {"num_experts": 1, "num_experts_per_tok": 1, "expert_names": ["public"]}
    edit_json(released / CONFIG, lambda config: config.update(fewer))

    with refused(UnexpectedTensorError, "model.layers.0.mlp.experts.1.down_proj.weight"):
        merge_experts(released, code, tmp_path / "merged")


@pytest.mark.parametrize(
    "index",
    ["{", "{}", "[]", json.dumps({"weight_map": {"lm_head.weight": "lost.safetensors"}})],
    ids=["no JSON", "no map", "a list", "a file that is not there"],
)
def test_an_anchor_whose_index_is_wrong_is_refused(one_owner, tmp_path, refused, index):
    (one_owner.anchor / INDEX).write_text(index)

    with refused(FlexOlmoError):
        merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")


def test_an_index_that_promises_a_tensor_its_file_lacks_is_refused(released, code, tmp_path, refused):
    names = FlexOlmoForCausalLM.from_pretrained(released).state_dict()
    edit_weights(released / WEIGHTS, lambda tensors: tensors.pop("lm_head.weight"))
    (released / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, WEIGHTS)}))

    with refused(FlexOlmoError, "lm_head.weight"):
        merge_experts(released, code, tmp_path / "merged")
