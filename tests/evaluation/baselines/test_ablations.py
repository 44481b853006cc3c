"""Ablations change what they name and nothing else."""

from dataclasses import asdict

import pytest
import torch

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM, merge_experts
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.ablations import ABLATIONS, Ablation
from flexolmo_hf.evaluation.baselines.rows import random_row
from tests.conftest import TINY, dense_model

H = TINY["hidden_size"]


@pytest.fixture
def embeddings():
    names = ("public", "math", "code")
    return {kind: {name: torch.randn(H) for name in names} for kind in ("domain", "hidden states")}


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("FlexOlmo", {}),
        ("router tuning", {"tuned": True}),
        ("no bias", {"bias": False}),
        ("random rows", {"rows": "random"}),
        ("random rows, no bias", {"rows": "random", "bias": False}),
        ("hidden-state rows", {"rows": "hidden states"}),
        ("no coordination", {"coordinated": False, "bias": False}),
    ],
)
def test_each_variant_differs_from_the_method_in_what_it_is_called_after(name, changed):
    whole = asdict(Ablation())
    assert {key: value for key, value in asdict(ABLATIONS[name]).items() if value != whole[key]} == changed


@pytest.mark.parametrize("name", [name for name, variant in ABLATIONS.items() if variant.coordinated])
def test_arguments_make_the_model_that_an_owner_trains(embeddings, name):
    variant = ABLATIONS[name]
    arguments = variant.from_dense_arguments("math", embeddings, hidden_size=H, bias_start=-0.5)
    model = FlexOlmoForCausalLM.from_dense(dense_model(), **arguments)
    expected = {key: random_row(key, H) for key in ("public", "math")}
    if variant.rows != "random":
        expected = embeddings[variant.rows]

    for mixture in model.mixtures:
        assert torch.equal(mixture.gate.weight, torch.stack([expected["public"], expected["math"]]))
        assert (mixture.gate.bias is not None) == variant.bias
        if variant.bias:
            assert mixture.gate.bias.tolist() == [0, -0.5]


def test_owners_who_never_meet_draw_the_same_public_row_and_can_be_merged(tmp_path):
    anchor = tmp_path / "anchor"
    dense_model().save_pretrained(anchor)
    packages = {}
    for owner in ("math", "code"):
        arguments = ABLATIONS["random rows, no bias"].from_dense_arguments(owner, {}, hidden_size=H)
        packages[owner] = ExpertPackage.from_model(FlexOlmoForCausalLM.from_dense(anchor, **arguments), owner)
    merge_experts(anchor, packages, tmp_path / "merged")
    rows = FlexOlmoForCausalLM.from_pretrained(tmp_path / "merged").mixtures[0].gate.weight

    assert torch.equal(rows, torch.stack([random_row(name, H) for name in ("public", "math", "code")]))
    assert not torch.allclose(rows[0], random_row("public", H, seed=1))


def test_what_does_not_fit_together_is_refused(embeddings):
    with pytest.raises(ConfigurationError, match="dense models have neither"):
        Ablation(coordinated=False)
    with pytest.raises(ConfigurationError, match="'encoder'"):
        Ablation(rows="encoder")
    with pytest.raises(ConfigurationError, match=r"'domain' rows for \['news'\]"):
        Ablation().from_dense_arguments("news", embeddings, hidden_size=H)
    with pytest.raises(ConfigurationError, match="build_no_coordination"):
        ABLATIONS["no coordination"].from_dense_arguments("math", embeddings, hidden_size=H)
