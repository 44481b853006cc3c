"""Models of several members hold them under names, and refuse what they cannot hold."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf.errors import (
    ConfigurationError,
    DuplicateExpertError,
    EmptyExpertSetError,
    InvalidExpertNameError,
    UnknownArgumentError,
)
from flexolmo_hf.evaluation.baselines import BranchTrainMergeForCausalLM, WeightedSoupForCausalLM
from flexolmo_hf.evaluation.baselines.branch_train_merge import BranchTrainMergeConfig
from tests.conftest import dense_model

EVERY_KIND = pytest.mark.parametrize("kind", [BranchTrainMergeForCausalLM, WeightedSoupForCausalLM])


@EVERY_KIND
def test_members_are_held_and_not_copied(kind):
    members = {"public": dense_model(), "math": dense_model()}
    model = kind.from_members(members)

    assert [(name, id(member)) for name, member in model.named_members()] == [(n, id(m)) for n, m in members.items()]
    assert not model.training
    assert (model.config.vocab_size, model.config.eos_token_id, model.config.pad_token_id) == (97, 1, 0)


@EVERY_KIND
def test_members_may_be_folders(kind, input_ids, tmp_path):
    members = {"public": dense_model(), "math": dense_model()}
    for name, member in members.items():
        member.save_pretrained(tmp_path / name)
    with torch.no_grad():
        read = kind.from_members({name: tmp_path / name for name in members})(input_ids).logits
        assert torch.equal(read, kind.from_members(members)(input_ids).logits)


@EVERY_KIND
def test_where_a_checkpoint_lies_is_where_its_members_are_read(kind, input_ids, tmp_path, monkeypatch):
    members = {"public": dense_model(num_hidden_layers=1), "math": dense_model(num_hidden_layers=1)}
    model = kind.from_members(members)
    model.save_pretrained(tmp_path / "inside")
    asked, read = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda *a, **k: asked.append(k["revision"]) or read(*a, **k)
    )
    loaded = kind.from_pretrained(tmp_path, subfolder="inside", revision="a-branch")

    assert asked == ["a-branch", "a-branch"]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@EVERY_KIND
def test_a_member_that_was_left_out_does_not_lie_beside_the_others(kind, refused, tmp_path):
    members = {"public": dense_model(num_hidden_layers=1), "math": dense_model(num_hidden_layers=1)}
    kind.from_members(members).save_pretrained(tmp_path)
    kind.from_members(members).save_pretrained(tmp_path)

    with refused(ConfigurationError, "member-math"):
        kind.from_members({"public": members["public"]}).save_pretrained(tmp_path)


@EVERY_KIND
def test_what_cannot_be_held_is_refused(kind, refused, tmp_path):
    model = dense_model()
    with refused(EmptyExpertSetError):
        kind.from_members({})
    with refused(ConfigurationError, "'public': 97", "'math': 98"):
        kind.from_members({"public": model, "math": dense_model(vocab_size=98)})
    with refused(InvalidExpertNameError, "a/b"):
        kind.from_members({"a/b": model})
    with refused(DuplicateExpertError, "Math"):
        kind.from_members({"math": model, "Math": model})
    with refused(ConfigurationError, "0 models for 1 names"):
        kind(kind.config_class(member_names=["public"]))
    for wish in ({"use_safetensors": False}, {"output_loading_info": True}):
        with refused(ConfigurationError, "output_loading_info"):
            kind.from_pretrained(tmp_path, **wish)


def test_a_keyword_of_the_constructor_that_nothing_reads_is_refused(refused):
    with refused(UnknownArgumentError, "membrs"):
        BranchTrainMergeForCausalLM(BranchTrainMergeConfig(member_names=["public"]), membrs=[dense_model()])


@pytest.mark.parametrize("lengths", [(96, 32), (32, 96)])
def test_an_ensemble_reads_texts_as_long_as_its_members_all_can(lengths):
    members = {f"m{length}": dense_model(max_position_embeddings=length) for length in lengths}
    assert BranchTrainMergeForCausalLM.from_members(members).config.max_position_embeddings == 32
