"""A fingerprint follows what a model computes, and not where it lies."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf.evaluation.suite.fingerprints import model_fingerprint
from tests.conftest import dense_model


@pytest.fixture
def model():
    return dense_model(num_hidden_layers=1)


def test_a_fingerprint_does_not_follow_the_place(model, tmp_path):
    for name in ("one", "other"):
        model.save_pretrained(tmp_path / name)
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "other"))

    assert model_fingerprint(one) == model_fingerprint(other)


def test_a_fingerprint_follows_the_weights(model):
    before = model_fingerprint(model)
    with torch.no_grad():
        model.model.norm.weight[0] += 1

    assert model_fingerprint(model) != before


def test_a_fingerprint_follows_the_settings(model):
    before = model_fingerprint(model)
    model.config.rms_norm_eps *= 2

    assert model_fingerprint(model) != before
