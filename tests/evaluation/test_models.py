"""Whatever is measured is loaded the same way, and what is no such thing is refused before weights are read."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf.errors import (
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedFileError,
    NotFlexOlmoError,
    UnknownExpertError,
)
from flexolmo_hf.evaluation.baselines import BranchTrainMergeForCausalLM
from flexolmo_hf.evaluation.models import load_for_evaluation, load_mixture, read_device, read_dtype
from tests.conftest import dense_model
from tests.modeling.test_expert_sets import named_model


@pytest.fixture
def saved(tmp_path, tokenizer):
    def save(model, name="MODEL"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return save


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def test_a_mixture_is_loaded_with_the_experts_that_are_named(saved, tokenizer, input_ids):
    place = saved(named_model(vocab_size=len(tokenizer)))
    expected = AutoModelForCausalLM.from_pretrained(place, active_experts=["public", "math"])
    for load in (load_for_evaluation, load_mixture):
        model, found = load(place, active_experts=["math", "public"])

        assert model.expert_names == ["public", "math"]
        assert not model.training
        assert torch.equal(logits(model, input_ids), logits(expected, input_ids))
        assert found("tea")["input_ids"] == tokenizer("tea")["input_ids"]
    assert load_for_evaluation(str(place))[0].expert_names == ["public", "math", "code", "news"]


def test_a_dense_model_is_loaded_and_has_no_experts_to_choose(saved, refused, tokenizer, input_ids):
    model = dense_model(vocab_size=len(tokenizer))
    place = saved(model)

    assert torch.equal(logits(load_for_evaluation(place)[0], input_ids), logits(model, input_ids))
    with refused(ConfigurationError, "['public']", "has no experts"):
        load_for_evaluation(place, active_experts=["public"])
    with refused(NotFlexOlmoError, "'olmo2'"):
        load_mixture(place)


def test_a_folder_of_branch_train_merge_is_loaded(saved, refused, tokenizer, input_ids):
    members = {name: dense_model(vocab_size=len(tokenizer), num_hidden_layers=1) for name in ("public", "math")}
    model = BranchTrainMergeForCausalLM.from_members(members, temperature=0.5)
    place = saved(model)
    loaded, _ = load_for_evaluation(place)

    assert isinstance(loaded, BranchTrainMergeForCausalLM)
    assert torch.equal(logits(loaded, input_ids), logits(model, input_ids))
    with refused(NotFlexOlmoError, "'flex_olmo'"):
        load_mixture(place)


def test_weights_are_float32_unless_another_dtype_is_asked_for(saved, tokenizer):
    place = saved(dense_model(vocab_size=len(tokenizer)).to(torch.bfloat16))

    assert load_for_evaluation(place)[0].dtype == torch.float32
    for dtype in ("auto", "bfloat16", torch.bfloat16):
        assert load_for_evaluation(place, dtype=dtype)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_for_evaluation, load_mixture])
def test_a_mixture_has_the_dtype_and_the_device_that_are_asked_for(saved, tokenizer, load):
    place = saved(named_model(vocab_size=len(tokenizer)).to(torch.bfloat16))

    assert load(place)[0].dtype == torch.float32
    assert load(place, dtype="auto")[0].dtype == load(place, dtype="bfloat16")[0].dtype == torch.bfloat16
    assert {parameter.device.type for parameter in load(place, device="meta")[0].parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", ["int8", "flaot32", "nn", torch.int64])
def test_a_dtype_that_weights_cannot_have_is_refused(dtype):
    with pytest.raises(ConfigurationError, match="no dtype"):
        read_dtype(dtype)


def test_a_device_that_is_not_there_is_refused():
    assert read_device(None) == read_device("cpu") == torch.device("cpu")
    for name in ("nowhere", "cuda:99"):
        with pytest.raises(ConfigurationError, match=f"no device '{name}'"):
            read_device(name)


@pytest.mark.parametrize("load", [load_for_evaluation, load_mixture])
def test_what_is_not_there_is_refused(saved, refused, tmp_path, tokenizer, load):
    place = saved(named_model(vocab_size=len(tokenizer)))
    (tmp_path / "EMPTY").mkdir()

    with refused(CheckpointNotFoundError, "'NOWHERE'"):
        load(tmp_path / "NOWHERE")
    with refused(DamagedFileError, "'config.json'", "'EMPTY'"):
        load(tmp_path / "EMPTY")
    with refused(UnknownExpertError, "Did you mean 'math'"):
        load(place, active_experts=["maht"])
    for file in place.glob("tokenizer*"):
        file.unlink()
    with refused(ConfigurationError, "'MODEL' holds no tokenizer", "save_pretrained"):
        load(place)
