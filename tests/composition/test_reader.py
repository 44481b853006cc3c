"""Reading a checkpoint tensor by tensor: the same names and bits as the model that loads from it."""

import json

import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.composition.reader import CheckpointReader, non_weight_files, open_safetensors
from flexolmo_hf.errors import DamagedFileError, IncompleteCheckpointError, NotFlexOlmoError
from tests.composition.conftest import VARIANTS, consortium, edit_json
from tests.conftest import dense_model, stock_model


def tensors(reader):
    return {name: reader.tensor(name) for name in reader.file_of}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("max_shard_size", ["5GB", 20_000], ids=["one file", "many files"])
def test_it_reads_the_state_of_the_model(tmp_path, settings, max_shard_size):
    model = consortium(tmp_path, ["math"], **settings).models["math"]
    model.save_pretrained(tmp_path / "saved", max_shard_size=max_shard_size)
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]

    assert equal(tensors(CheckpointReader(tmp_path / "saved")), state)


def test_it_reads_a_dense_model_as_the_public_expert(tmp_path):
    dense_model().save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)
    as_flexolmo = FlexOlmoForCausalLM.from_dense(tmp_path).state_dict()

    assert reader.is_dense
    assert reader.config.expert_names == ["public"]
    assert equal(tensors(reader), {key: value for key, value in as_flexolmo.items() if ".mlp.gate." not in key})


def test_a_dense_models_settings_are_carried_over(tmp_path):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    dense_model(rms_norm_eps=3e-4, rope_parameters=rope).save_pretrained(tmp_path)
    read, made = CheckpointReader(tmp_path).config, FlexOlmoForCausalLM.from_dense(tmp_path).config

    assert read.rms_norm_eps == made.rms_norm_eps == 3e-4
    assert read.rope_parameters == made.rope_parameters
    assert read.rope_parameters["rope_theta"] == 7.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_shape_and_size_are_those_of_the_tensor(tmp_path, dtype):
    stock_model().to(dtype).save_pretrained(tmp_path)
    reader = CheckpointReader(tmp_path)

    for name, tensor in tensors(reader).items():
        assert reader.shape_and_size(name) == (tuple(tensor.shape), tensor.nbytes)


def test_a_tensor_that_no_file_holds_is_named(one_owner, refused):
    reader = CheckpointReader(one_owner.anchor)

    with refused(IncompleteCheckpointError, "model.layers.9.nothing"):
        reader.tensor("model.layers.9.nothing")


def test_a_file_that_vanished_is_named(one_owner, refused):
    reader = CheckpointReader(one_owner.anchor)
    (one_owner.anchor / "model.safetensors").unlink()

    with refused(DamagedFileError, "model.safetensors", "missing"):
        reader.tensor("lm_head.weight")


def test_a_checkpoint_without_weights_is_refused(one_owner, refused):
    (one_owner.anchor / "model.safetensors").unlink()

    with refused(DamagedFileError, "model.safetensors", "missing"):
        CheckpointReader(one_owner.anchor)


@pytest.mark.parametrize("model_type", ["llama", "olmo", "mixtral"])
def test_another_architecture_is_refused(one_owner, refused, model_type):
    edit_json(one_owner.anchor / "config.json", lambda config: config.update(model_type=model_type))

    with refused(NotFlexOlmoError, repr(model_type)):
        CheckpointReader(one_owner.anchor)


def test_an_index_cannot_lead_out_of_the_folder(one_owner, tmp_path, refused):
    (one_owner.anchor / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    weight_map = {"lm_head.weight": "../elsewhere.safetensors"}
    (one_owner.anchor / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    with refused(DamagedFileError, "model.safetensors.index.json"):
        CheckpointReader(one_owner.anchor)


@pytest.mark.parametrize("content", [None, b"", b"\x80\x04.", b"\xff" * 64, b'{"a": 1}'], ids=repr)
def test_what_is_not_a_safetensors_file_is_refused(tmp_path, refused, content):
    if content is not None:
        (tmp_path / "weights").write_bytes(content)

    with refused(DamagedFileError, "'weights'"):
        open_safetensors(tmp_path / "weights")


def test_a_folder_in_place_of_a_weight_file_is_refused(tmp_path, refused):
    (tmp_path / "weights").mkdir()

    with refused(DamagedFileError, "'weights'"):
        open_safetensors(tmp_path / "weights")


def test_the_files_beside_the_weights_are_the_tokenizers_and_generation_settings(tmp_path, tokenizer):
    stock_model().save_pretrained(tmp_path)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(tmp_path)
    for name in ("README.md", "expert_training.json", "trainer_state.json", "modeling.py"):
        (tmp_path / name).write_text("{}")

    names = {file.name for file in non_weight_files(tmp_path)}
    expected = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}
    assert names == expected
