"""The proof notices every bit of a frozen tensor, and nothing of a trained one."""

import json

import pytest
import torch

from flexolmo_hf import freeze_except
from flexolmo_hf.errors import FrozenMovedError
from flexolmo_hf.trainers.proof import FrozenProof, frozen_tensors, hash_tensors
from tests.modeling.test_expert_sets import named_model
from tests.trainers.conftest import TEXT
from tests.trainers.test_expert import Watch


@pytest.fixture
def frozen():
    model = named_model(router_bias=True)
    freeze_except(model, "math")
    return model


@torch.no_grad()
def test_it_notices_every_frozen_tensor_and_no_trained_one(frozen):
    proof = FrozenProof(frozen)
    names = set(frozen_tensors(frozen))
    found = proof.check(frozen)
    assert found["fingerprint before"] == found["fingerprint after"] == proof.fingerprint
    for name, parameter in frozen.named_parameters():
        value = parameter.view(-1)[0].clone()
        parameter.view(-1)[0] = torch.nextafter(value, value + 1)
        if name in names:
            with pytest.raises(FrozenMovedError, match=name.replace(".", r"\.")):
                proof.check(frozen)
        else:
            proof.check(frozen)
        parameter.view(-1)[0] = value
    proof.check(frozen)


@torch.no_grad()
def test_the_other_rows_of_a_router_are_frozen(frozen):
    proof, at = FrozenProof(frozen), frozen.expert_position("math")
    gate = frozen.mixtures[1].gate
    gate.trained_row += 1
    gate.weight[at] += 1
    proof.check(frozen)
    gate.weight[at - 1] += 1
    with pytest.raises(FrozenMovedError, match="layers.1.mlp.gate.weight"):
        proof.check(frozen)


def test_hashes_tell_dtype_shape_and_order_apart():
    values = torch.arange(6.0)
    alike = {
        "a": values,
        "b": values.view(2, 3),
        "c": values.flip(0),
        "d": values.double(),
        "e": values.bfloat16(),
        "f": torch.zeros(0),
    }
    assert len(set(hash_tensors(alike).values())) == len(alike)
    assert hash_tensors({"x": values.view(2, 3).T})["x"] == hash_tensors({"x": values.view(2, 3).T.contiguous()})["x"]


def test_every_save_and_the_end_write_the_proof(trainer, tmp_path):
    run = trainer(TEXT, save_strategy="steps", save_steps=1)
    run.train()
    for folder, step in (("checkpoint-1", 1), ("checkpoint-2", 2), (".", 2)):
        proof = json.loads((tmp_path / "run" / folder / "frozen.json").read_text())
        assert proof["fingerprint before"] == proof["fingerprint after"] == run._proof.fingerprint
        assert proof["step"] == step
        assert proof["frozen tensors"] > 10


def test_a_run_in_which_something_frozen_moves_stops(trainer, model, tmp_path):
    run = trainer(TEXT, save_strategy="steps", save_steps=1)

    def meddle():
        with torch.no_grad():
            model.model.embed_tokens.weight[3] += 1

    run.add_callback(Watch(meddle))
    with pytest.raises(FrozenMovedError, match="embed_tokens"):
        run.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    assert not (tmp_path / "run" / "frozen.json").exists()


def test_the_second_fingerprint_is_computed_from_what_is_there(trainer, tmp_path, monkeypatch):
    run = trainer(TEXT, save_strategy="steps", save_steps=1)
    monkeypatch.setattr("flexolmo_hf.trainers.proof.fingerprint", lambda hashes: f"of {sorted(hashes)[0]}")
    run.train()
    proof = json.loads((tmp_path / "run" / "checkpoint-1" / "frozen.json").read_text())
    assert proof["fingerprint after"].startswith("of ")
    assert proof["fingerprint before"] == run._proof.fingerprint
