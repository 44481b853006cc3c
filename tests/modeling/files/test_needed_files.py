"""A model that leaves experts out needs the files of the others, and opens no more."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.modeling.files.needed_files import absent_experts, files_needed, read_weight_map
from tests.conftest import TINY
from tests.modeling.files.test_download import IDS, TWO, change_settings, expert_file
from tests.modeling.test_expert_sets import named_model


def test_a_file_is_needed_for_a_single_tensor_that_is_wanted():
    config = FlexOlmoConfig(**TINY, num_experts=12, active_experts=["public", "expert_1"])
    weight_map = {
        "model.layers.0.mlp.gate.weight": "a",
        "model.layers.0.mlp.experts.1.up_proj.weight": "b",
        "model.layers.0.mlp.experts.2.up_proj.weight": "b",
        "model.layers.0.mlp.experts.10.up_proj.weight": "c",
        "model.layers.0.mlp.experts.11.up_proj.weight": "c",
    }

    assert files_needed(weight_map, absent_experts(config)) == {"a", "b"}
    assert files_needed(weight_map, absent_experts(FlexOlmoConfig(**TINY, num_experts=12))) == {"a", "b", "c"}


NO_PLAIN_FILES = ["../a.safetensors", "/a.safetensors", "..\\a.safetensors", "*.safetensors", "a.bin", 1, None]


@pytest.mark.parametrize(
    "content", ["[]", {}, {"weight_map": {}}, *({"weight_map": {"x": file}} for file in NO_PLAIN_FILES)], ids=str
)
def test_an_index_may_only_name_plain_weight_files(tmp_path, content):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps(content))

    with pytest.raises(DamagedFileError):
        read_weight_map(index)


@pytest.mark.parametrize("stated", [{"dtype": "bfloat16"}, {"dtype": None}], ids=["dtype stated", "dtype not stated"])
@pytest.mark.parametrize("loader", [AutoModelForCausalLM, FlexOlmoForCausalLM], ids=["auto", "class"])
def test_files_of_experts_that_were_left_out_are_not_even_opened(tmp_path, loader, stated):
    named_model().to(torch.bfloat16).save_pretrained(tmp_path)
    expected = loader.from_pretrained(tmp_path, dtype=torch.bfloat16, active_experts=TWO)(torch.tensor(IDS)).logits
    change_settings(tmp_path, **stated)
    for name in ("code", "news"):
        (tmp_path / expert_file(name)).write_bytes(b"garbage")
    loaded = loader.from_pretrained(tmp_path, active_experts=TWO)

    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(torch.tensor(IDS)).logits, expected)


@pytest.mark.parametrize("asked", [{"dtype": "float32"}, {"torch_dtype": torch.float32}], ids=["dtype", "torch_dtype"])
def test_a_dtype_that_is_asked_for_goes_before_that_of_the_files(tmp_path, asked):
    named_model().to(torch.bfloat16).save_pretrained(tmp_path)
    change_settings(tmp_path, dtype=None)

    assert FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=TWO, **asked).dtype == torch.float32
