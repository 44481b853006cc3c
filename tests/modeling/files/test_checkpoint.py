"""Loading reads what it was asked for, and refuses what it would otherwise have to guess."""

import hashlib
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM, FlexOlmoMixtureModel, merge_experts
from flexolmo_hf.errors import (
    ConfigurationError,
    DamagedFileError,
    IncompleteCheckpointError,
    NotFlexOlmoError,
    UnexpectedTensorError,
)
from tests.conftest import as_one_file, dense_model, stock_model
from tests.modeling.test_expert_sets import NAMES, named_model


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint in one file, as stock transformers writes small ones."""
    named_model().save_pretrained(tmp_path / "checkpoint")
    return as_one_file(tmp_path / "checkpoint").parent


def rewrite(checkpoint, change):
    """Change the tensors of a one-file checkpoint in place."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def test_released_checkpoints_get_default_names(tmp_path):
    stock_model(num_experts=3, num_experts_per_tok=3).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert model.expert_names == ["public", "expert_1", "expert_2"]
    assert model.config.num_experts_per_tok == 3


def test_only_the_asked_for_experts_exist_in_memory(checkpoint):
    model, report = AutoModelForCausalLM.from_pretrained(
        checkpoint, active_experts=["public", "code"], output_loading_info=True
    )
    mixture = model.model.layers[0].mlp

    assert list(mixture.experts) == ["0", "2"]
    assert mixture.gate.weight.shape[0] == 2
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
def test_values_of_absent_experts_are_never_used(checkpoint, input_ids):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, active_experts=["public", "code"])
    before = model(input_ids).logits

    def poison(tensors):
        for key, tensor in tensors.items():
            if ".experts.1." in key or ".experts.3." in key:
                tensor.fill_(float("nan"))
            if ".mlp.gate." in key:
                tensor[[1, 3]] = float("nan")

    rewrite(checkpoint, poison)
    again = AutoModelForCausalLM.from_pretrained(checkpoint, active_experts=["public", "code"])

    assert torch.equal(again(input_ids).logits, before)


@torch.no_grad()
def test_a_sharded_checkpoint_loads_in_part(tmp_path, input_ids):
    model = named_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    part = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["math"])
    model.set_active_experts(["math"])

    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(part(input_ids).logits, model(input_ids).logits)


def test_training_a_loaded_model_never_writes_to_its_files(checkpoint, input_ids):
    # The weights are mapped from the file: a shared mapping would carry every step back to disk.
    before = hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).digest()
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    model(input_ids, labels=input_ids).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()

    assert hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).digest() == before


@torch.no_grad()
def test_the_backbone_loads_alone(checkpoint, input_ids):
    whole = AutoModelForCausalLM.from_pretrained(checkpoint, active_experts=["public", "news"])
    backbone = AutoModel.from_pretrained(checkpoint, active_experts=["public", "news"])

    assert type(backbone) is FlexOlmoMixtureModel
    assert torch.equal(backbone(input_ids).last_hidden_state, whole.model(input_ids).last_hidden_state)


def test_a_dtype_can_be_asked_for(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16, active_experts=["public", "math"])

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_missing_tensors_are_refused_instead_of_made_up(checkpoint):
    rewrite(checkpoint, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))

    with pytest.raises(IncompleteCheckpointError, match=r"model\.layers\.1\.mlp\.experts\.2\.up_proj\.weight"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    # Whoever does not ask for that expert does not need its tensors.
    AutoModelForCausalLM.from_pretrained(checkpoint, active_experts=["public", "math"])


@pytest.mark.parametrize("rows", [3, 5])
def test_a_router_matrix_of_another_height_is_refused(checkpoint, rows):
    def resize(tensors):
        tensors["model.layers.0.mlp.gate.weight"] = torch.zeros(rows, 64)

    rewrite(checkpoint, resize)
    for active in (None, ["public", "math"]):
        with pytest.raises((IncompleteCheckpointError, RuntimeError)):
            AutoModelForCausalLM.from_pretrained(checkpoint, active_experts=active)


def test_biases_that_the_configuration_does_not_know_are_refused(tmp_path):
    named_model(router_bias=True).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "router_bias": False}))

    with pytest.raises(UnexpectedTensorError, match="router_bias"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_bias_of_the_public_expert_is_refused(tmp_path):
    model = named_model(router_bias=True)
    model.mixtures[1].gate.bias.data[0] = -0.5
    model.save_pretrained(tmp_path)

    with pytest.raises(ConfigurationError, match="public expert"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["math", "code"])


def test_a_truncated_file_is_refused_by_name(checkpoint):
    os.truncate(checkpoint / "model.safetensors", 2000)

    with pytest.raises(DamagedFileError, match=r"'model\.safetensors' cannot be used: it is truncated"):
        AutoModelForCausalLM.from_pretrained(checkpoint)


def test_a_checkpoint_of_another_architecture_is_refused(tmp_path):
    dense_model().save_pretrained(tmp_path)

    with pytest.raises(NotFlexOlmoError, match="flexolmo init"):
        FlexOlmoForCausalLM.from_pretrained(tmp_path)


def test_pickled_weights_are_never_read(checkpoint):
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()

    with pytest.raises(DamagedFileError, match=r"'model\.safetensors' cannot be used: it is missing"):
        AutoModelForCausalLM.from_pretrained(checkpoint)
    with pytest.raises(ConfigurationError, match="pickled"):
        AutoModelForCausalLM.from_pretrained(checkpoint, use_safetensors=False)


def test_saving_and_loading_is_the_identity_with_biases(tmp_path, input_ids):
    model = named_model(router_bias=True)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert again.config.expert_names == NAMES


def test_stock_loads_in_the_same_process_before_and_after(checkpoint, input_ids):
    ours = AutoModelForCausalLM.from_pretrained(checkpoint)
    stock, report = StockModel.from_pretrained(checkpoint, output_loading_info=True)

    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(stock(input_ids).logits, ours(input_ids).logits, atol=1e-5, rtol=0)


def test_a_saved_folder_holds_no_path_of_this_machine(checkpoint):
    for file in checkpoint.glob("*.json"):
        assert str(checkpoint.parent) not in file.read_text()


def test_the_configuration_survives_a_round_trip(checkpoint):
    config = AutoConfig.from_pretrained(checkpoint)

    assert config.expert_names == NAMES
    assert config.active_experts is None
    assert config.num_experts == 4


@torch.no_grad()
@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_a_file_of_an_absent_expert_is_not_even_opened(tmp_path, input_ids, damage):
    dense = dense_model()
    for name in ("math", "code"):
        ExpertPackage.from_model(FlexOlmoForCausalLM.from_dense(dense, expert=name), name).save_pretrained(
            tmp_path / name
        )
    dense.save_pretrained(tmp_path / "dense")
    merged = merge_experts(tmp_path / "dense", {n: tmp_path / n for n in ("math", "code")}, tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(merged)
    whole.set_active_experts(["public", "math"])
    (file,) = merged.glob("model-expert-code-*")
    file.unlink() if damage == "gone" else file.write_bytes(b"garbage")
    part = AutoModelForCausalLM.from_pretrained(merged, active_experts=["public", "math"])

    assert torch.equal(part(input_ids).logits, whole(input_ids).logits)
    with pytest.raises(DamagedFileError, match=file.name):
        AutoModelForCausalLM.from_pretrained(merged)


@torch.no_grad()
def test_a_checkpoint_in_a_subfolder_loads_and_names_what_is_missing_there(checkpoint, input_ids):
    model = AutoModelForCausalLM.from_pretrained(checkpoint.parent, subfolder="checkpoint", active_experts=["math"])
    assert model.expert_names == ["math"]

    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(DamagedFileError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(checkpoint.parent, subfolder="checkpoint")


def test_a_set_of_experts_for_a_model_that_has_none_is_refused(tmp_path):
    dense_model().save_pretrained(tmp_path)
    with pytest.raises(NotFlexOlmoError, match="from_dense"):
        FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["public"])
    # The Auto classes find another architecture, and hand it a keyword it does not know.
    with pytest.raises(TypeError, match="active_experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["public"])
    with pytest.raises(ValueError, match="active_experts"):
        dense_model().generate(torch.ones(1, 2, dtype=torch.long), active_experts=["public"])
