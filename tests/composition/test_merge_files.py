"""The folder that merging writes: whose tensors lie in which file, what comes along, and what never does."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig

from flexolmo_hf import FlexOlmoForCausalLM, merge_experts
from tests.composition.conftest import consortium, edit_weights


def tensors_of(file):
    with safe_open(file, framework="pt") as content:
        return {key: content.get_tensor(key) for key in content.keys()}  # noqa: SIM118 (not a mapping)


@pytest.fixture
def sharded(two_owners, tmp_path):
    return merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged", max_shard_size=20_000)


def test_a_file_holds_one_experts_matrices_and_nothing_else(sharded):
    for index, name in enumerate(["public", "math", "code"]):
        files = list(sharded.glob(f"model-expert-{name}-*.safetensors"))
        keys = [key for file in files for key in tensors_of(file)]
        assert len(files) > 1
        assert len(keys) == 6
        assert all(f".mlp.experts.{index}." in key for key in keys)
    assert not any(".experts." in key for file in sharded.glob("model-shared-*") for key in tensors_of(file))


def test_no_file_is_larger_than_asked_unless_one_tensor_is(sharded):
    for file in sharded.glob("*.safetensors"):
        sizes = [tensor.nbytes for tensor in tensors_of(file).values()]
        assert sum(sizes) <= 20_000 or len(sizes) == 1


def test_the_index_lists_every_tensor_once_and_their_total_size(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    files = {file.name: tensors_of(file) for file in sharded.glob("*.safetensors")}
    held = {(key, name): tensor.nbytes for name, tensors in files.items() for key, tensor in tensors.items()}

    assert set(index["weight_map"].items()) == set(held)
    assert index["metadata"]["total_size"] == sum(held.values())


def test_shards_do_not_change_the_model(sharded, two_owners, tmp_path):
    merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "whole")
    one, other = (FlexOlmoForCausalLM.from_pretrained(f).state_dict() for f in (sharded, tmp_path / "whole"))

    assert all(torch.equal(one[key], other[key]) for key in one | other)


def test_tied_embeddings_are_written_once_though_the_anchor_holds_them_twice(tmp_path):
    owners = consortium(tmp_path, tie_word_embeddings=True)
    embeddings = "model.embed_tokens.weight"
    edit_weights(owners.anchor / "model.safetensors", lambda t: t.update({"lm_head.weight": t[embeddings].clone()}))
    merged = merge_experts(owners.anchor, owners.packages, tmp_path / "merged")

    assert not any("lm_head.weight" in tensors_of(file) for file in merged.glob("*.safetensors"))


def test_the_anchors_tokenizer_and_generation_settings_come_along(one_owner, tmp_path, tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    tokenizer.save_pretrained(one_owner.anchor)
    GenerationConfig(temperature=0.5, do_sample=True).save_pretrained(one_owner.anchor)
    merged = merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")

    assert AutoTokenizer.from_pretrained(merged)("tea")["input_ids"] == tokenizer("tea")["input_ids"]
    assert AutoTokenizer.from_pretrained(merged).chat_template == tokenizer.chat_template
    assert GenerationConfig.from_pretrained(merged).temperature == 0.5


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "training_args.bin", "scaler.pt", "tokenizer.pkl", "vocab.pt"])
def test_a_pickle_beside_the_anchor_is_neither_opened_nor_copied(one_owner, tmp_path, name):
    (one_owner.anchor / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    merged = merge_experts(one_owner.anchor, one_owner.packages, tmp_path / "merged")

    assert not (tmp_path / "exploded").exists()
    assert {file.suffix for file in merged.iterdir()} == {".safetensors", ".json", ".md"}


def test_no_file_names_the_folders_of_whoever_merged(two_owners, tmp_path, tokenizer):
    tokenizer.save_pretrained(two_owners.anchor)
    merged = merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")

    assert [file.name for file in merged.iterdir() if str(tmp_path).encode() in file.read_bytes()] == []
