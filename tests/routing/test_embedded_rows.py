"""Rows made from text: a model starts from them and remembers how they were made; others are refused at its side."""

import copy
import json
import logging

import numpy as np
import pytest
import torch
from transformers import AutoConfig
from transformers.models.flex_olmo import FlexOlmoConfig as StockConfig

from flexolmo_hf import (
    DomainEmbedding,
    ExpertPackage,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    compare_rows,
    domain_embedding,
    merge_experts,
)
from flexolmo_hf.composition.manifest import Manifest
from flexolmo_hf.errors import ConfigurationError, RouterProjectionError
from flexolmo_hf.modeling.embedded_row import RouterProjection
from tests.composition.conftest import edit_json, move_expert, pack
from tests.conftest import TINY, dense_model

HIDDEN, LAYERS = TINY["hidden_size"], TINY["num_hidden_layers"]


def embedded(*shape, width=8, seed=0, encoder="", scale=0.5):
    return DomainEmbedding(torch.randn(shape or (HIDDEN,)), RouterProjection(width, seed, encoder), scale, 9)


@pytest.fixture
def dense(tmp_path):
    model = dense_model()
    model.save_pretrained(tmp_path / "anchor")
    return model


# Starting from them.


@pytest.mark.parametrize("shape", [(HIDDEN,), (LAYERS, HIDDEN)])
def test_an_embedding_becomes_the_row_of_its_expert(dense, shape):
    row = embedded(*shape)
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings={"math": row})

    for layer, mixture in enumerate(model.mixtures):
        assert torch.equal(mixture.gate.weight[1], row.vector if row.vector.dim() == 1 else row.vector[layer])
        assert not mixture.gate.weight[0].any()


def test_the_configuration_remembers_how_the_rows_were_made(tmp_path, dense):
    rows = {"public": embedded(seed=3), "math": embedded(seed=3, encoder="owner/name")}
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)
    model.save_pretrained(tmp_path / "model")
    found = AutoConfig.from_pretrained(tmp_path / "model")

    assert found.router_projection == {"encoder_width": 8, "seed": 3, "encoder": "owner/name"}
    assert found.router_row_scale == 0.5


def test_stock_transformers_reads_the_configuration_all_the_same(tmp_path, dense):
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings={"math": embedded()})
    model.save_pretrained(tmp_path / "model")

    assert StockConfig.from_pretrained(tmp_path / "model").num_experts == 2


def test_rows_can_be_brought_to_a_norm(dense):
    rows = {"public": torch.randn(LAYERS, HIDDEN), "math": embedded()}
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows, router_row_scale=2)

    for layer, mixture in enumerate(model.mixtures):
        assert torch.allclose(mixture.gate.weight.norm(dim=1), torch.tensor([2.0, 2.0]))
        cosine = torch.cosine_similarity(mixture.gate.weight[0], rows["public"][layer], dim=0)
        assert cosine.item() == pytest.approx(1)
    assert model.config.router_row_scale == 2.0


def test_arrays_say_nothing_of_how_they_were_made(dense):
    rows = {"public": np.ones(HIDDEN), "math": torch.ones(HIDDEN)}
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)

    assert model.config.router_projection is None
    assert model.config.router_row_scale is None


def test_one_array_among_embeddings_leaves_the_scale_unknown(dense):
    rows = {"public": torch.ones(HIDDEN), "math": embedded()}
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)

    assert model.config.router_row_scale is None


UNFIT = {
    "another width": (DomainEmbedding(torch.ones(HIDDEN + 1)), "Project it to the hidden size"),
    "another number of layers": (DomainEmbedding(torch.ones(LAYERS + 1, HIDDEN)), "has shape (3, 64)"),
    "NaN": (DomainEmbedding(torch.full((HIDDEN,), torch.nan)), "NaN"),
}


@pytest.mark.parametrize(("row", "says"), UNFIT.values(), ids=UNFIT)
def test_an_embedding_that_does_not_fit_is_refused(dense, row, says):
    with pytest.raises(ConfigurationError) as caught:
        FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings={"math": row})
    assert says in str(caught.value)


def test_a_row_of_zero_cannot_be_scaled(dense):
    with pytest.raises(ConfigurationError, match="no direction"):
        FlexOlmoForCausalLM.from_dense(dense, router_embeddings={"public": torch.zeros(HIDDEN)}, router_row_scale=1.0)


DIFFERENCES = pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 1}, "seed is 0 and 1"),
        ({"seed": None}, "seed is 0 and None"),
        ({"width": 9}, "encoder_width is 8 and 9"),
        ({"encoder": "b/b"}, "encoder is 'a/a' and 'b/b'"),
    ],
    ids=str,
)


@DIFFERENCES
def test_embeddings_made_in_different_ways_are_refused_together(dense, changes, says):
    rows = {"public": embedded(encoder="a/a"), "math": embedded(**changes)}
    with pytest.raises(RouterProjectionError) as caught:
        FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "record",
    [{"seed": 0}, {"encoder_width": 0}, {"encoder_width": "8"}, {"encoder_width": 8, "encoder": "/a/path"}, {"a": 1}],
    ids=str,
)
def test_a_record_that_makes_no_sense_is_refused_by_the_configuration(record):
    with pytest.raises(ConfigurationError) as caught:
        FlexOlmoConfig(**TINY, num_experts=2, router_projection=record)
    assert "/a/path" not in str(caught.value)


def test_a_scale_that_makes_no_sense_is_refused_by_the_configuration():
    with pytest.raises(ConfigurationError, match="scale"):
        FlexOlmoConfig(**TINY, num_experts=2, router_row_scale=0.0)


# Side by side.


def trained(dense, folder, name, public, row):
    """Let an owner train an expert from a row, and write its package."""
    rows = {"public": public} if row is None else {"public": public, name: row}
    model = move_expert(FlexOlmoForCausalLM.from_dense(dense, expert=name, router_embeddings=rows), name)
    return pack(model, name, folder / f"package-{name}")


PUBLIC_ROW = torch.linspace(-1, 1, HIDDEN)


def test_a_package_remembers_the_projection_it_was_trained_with(tmp_path, dense):
    folder = trained(dense, tmp_path, "math", PUBLIC_ROW, embedded(seed=4, encoder="a/a"))

    assert ExpertPackage.from_pretrained(folder).manifest.router_projection == RouterProjection(8, 4, "a/a")


def test_a_manifest_written_without_a_projection_is_read(tmp_path, dense):
    folder = trained(dense, tmp_path, "math", PUBLIC_ROW, embedded())
    edit_json(folder / "manifest.json", lambda content: content.pop("router_projection"))

    assert Manifest.read(folder).router_projection is None


def test_packages_of_one_projection_merge_and_the_model_remembers_it(tmp_path, dense):
    packages = {
        "math": trained(dense, tmp_path, "math", PUBLIC_ROW, embedded()),
        "code": trained(dense, tmp_path, "code", PUBLIC_ROW, embedded(encoder="a/a")),
        "news": trained(dense, tmp_path, "news", PUBLIC_ROW, None),
    }
    merge_experts(tmp_path / "anchor", packages, tmp_path / "merged")
    merged = json.loads((tmp_path / "merged" / "config.json").read_text())

    assert merged["router_projection"] == {"encoder_width": 8, "seed": 0, "encoder": "a/a"}


def test_packages_without_embeddings_merge_as_before(tmp_path, dense):
    packages = {name: trained(dense, tmp_path, name, PUBLIC_ROW, None) for name in ("math", "code")}
    merge_experts(tmp_path / "anchor", packages, tmp_path / "merged")

    assert FlexOlmoConfig.from_pretrained(tmp_path / "merged").router_projection is None


@DIFFERENCES
def test_packages_of_different_projections_are_refused_by_name(tmp_path, dense, refused, changes, says):
    packages = {
        "math": trained(dense, tmp_path, "math", PUBLIC_ROW, embedded(encoder="a/a")),
        "code": trained(dense, tmp_path, "code", PUBLIC_ROW, embedded(**changes)),
    }
    with refused(RouterProjectionError, says, "'math'", "'code'"):
        merge_experts(tmp_path / "anchor", packages, tmp_path / "merged")


def test_another_seed_is_named_before_the_public_row_that_differs_for_it(tmp_path, dense, refused):
    packages = {
        "math": trained(dense, tmp_path, "math", embedded(seed=0), embedded(seed=0)),
        "code": trained(dense, tmp_path, "code", embedded(seed=1), embedded(seed=1)),
    }
    with refused(RouterProjectionError, "seed is 0 and 1"):
        merge_experts(tmp_path / "anchor", packages, tmp_path / "merged")


def test_a_package_of_another_projection_than_the_anchors_is_refused(tmp_path, dense, refused):
    public = embedded(seed=0)
    FlexOlmoForCausalLM.from_dense(dense, router_embeddings={"public": public}).save_pretrained(tmp_path / "flex")
    package = trained(dense, tmp_path, "math", public.vector, embedded(seed=1))

    with refused(RouterProjectionError, "'the anchor'", "'math'", "seed is 0 and 1"):
        merge_experts(tmp_path / "flex", {"math": package}, tmp_path / "merged")


def test_a_live_model_refuses_another_projection_and_remembers_its_own(tmp_path, dense):
    math = trained(dense, tmp_path, "math", PUBLIC_ROW, embedded(seed=0))
    code = trained(dense, tmp_path, "code", PUBLIC_ROW, embedded(seed=1))
    model = FlexOlmoForCausalLM.from_dense(dense, router_embeddings={"public": PUBLIC_ROW})
    model.add_expert(math)
    assert model.config.router_projection["seed"] == 0

    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RouterProjectionError, match="seed is 0 and 1"):
        model.add_expert(code)
    assert model.expert_names == ["public", "math"]
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("record", [{"encoder_width": 8, "seed": -1}, {"seed": 1}, {"encoder_width": 8, "more": 1}])
def test_a_manifest_with_a_projection_that_is_none_is_refused(tmp_path, dense, record):
    folder = trained(dense, tmp_path, "math", PUBLIC_ROW, embedded())
    edit_json(folder / "manifest.json", lambda content: content.update(router_projection=record))

    with pytest.raises(ConfigurationError):
        ExpertPackage.from_pretrained(folder)


@pytest.mark.parametrize("alike", [True, False])
def test_merging_warns_of_experts_whose_rows_are_nearly_parallel(tmp_path, dense, caplog, alike):
    row = embedded()
    packages = {
        "math": trained(dense, tmp_path, "math", PUBLIC_ROW, row),
        "code": trained(dense, tmp_path, "code", PUBLIC_ROW, row if alike else embedded()),
    }
    merge_experts(tmp_path / "anchor", packages, tmp_path / "merged")
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]

    assert ["'math' and 'code' are nearly parallel" in warning for warning in warnings] == [True] * alike


def test_owners_who_share_a_seed_get_rows_that_compare_as_their_embeddings_do(tmp_path, dense):
    def encode(topic):
        return lambda texts: np.stack([topic + np.random.default_rng(len(text)).normal(size=8) / 9 for text in texts])

    topics = {name: np.random.default_rng(number).normal(size=8) for number, name in enumerate(["public", "math"])}
    texts = ["a", "bb", "ccc"]
    rows = {name: domain_embedding(texts, encoder=encode(topic), hidden_size=HIDDEN) for name, topic in topics.items()}
    plain = [domain_embedding(texts, encoder=encode(topic)).vector for topic in topics.values()]
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_embeddings=rows)

    (pair,) = compare_rows(model).pairs
    assert pair.mean == pytest.approx(torch.cosine_similarity(*plain, dim=0).item(), abs=1e-5)
