"""Comparing rows: the cosines are those of the definition, and nearly parallel experts bring a warning."""

import copy
import logging

import pytest
import torch

from flexolmo_hf import compare_rows
from flexolmo_hf.routing.row_comparison import compare_vectors
from tests.modeling.test_expert_sets import NAMES, named_model


def test_every_two_experts_are_compared_in_every_layer():
    model = named_model()
    found = compare_rows(model)

    assert [(pair.first, pair.second) for pair in found.pairs] == [
        ("public", "math"),
        ("public", "code"),
        ("public", "news"),
        ("math", "code"),
        ("math", "news"),
        ("code", "news"),
    ]
    pair = found.pairs[3]
    cosines = [torch.cosine_similarity(m.gate.weight[1], m.gate.weight[2], dim=0).item() for m in model.mixtures]
    assert pair.mean == pytest.approx(sum(cosines) / len(cosines), abs=1e-5)
    assert (pair.lowest, pair.highest) == (pytest.approx(min(cosines), abs=1e-5), pytest.approx(max(cosines), abs=1e-5))
    norms = [m.gate.weight[3].norm().item() for m in model.mixtures]
    assert found.norms["news"] == pytest.approx(sum(norms) / len(norms), rel=1e-5)
    assert list(found.norms) == NAMES


def test_a_row_that_is_being_trained_is_compared_as_it_is_now():
    model = named_model()
    for mixture in model.mixtures:
        mixture.gate.split_row(1)
        mixture.gate.trained_row.data = mixture.gate.weight.data[2].clone()

    assert compare_rows(model).parallel[0].second == "code"


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_nearly_parallel_rows_bring_a_warning_with_both_names(caplog):
    model = named_model()
    for mixture in model.mixtures:
        mixture.gate.weight.data[3] = 2 * mixture.gate.weight.data[1] + 0.001
    found = compare_rows(model)

    assert [(pair.first, pair.second) for pair in found.parallel] == [("math", "news")]
    (warning,) = warnings(caplog)
    assert "'math' and 'news'" in warning


@pytest.mark.parametrize(("cosine", "warned"), [(0.951, True), (0.949, False), (-1.0, False)])
def test_the_limit_is_a_mean_cosine_of_095(caplog, cosine, warned):
    second = torch.tensor([[cosine, (1 - cosine**2) ** 0.5]] * 3)
    compare_vectors({"a": torch.tensor([[1.0, 0.0]] * 3), "b": second})

    assert bool(warnings(caplog)) == warned


def test_one_layer_with_parallel_rows_is_no_reason_to_warn(caplog):
    found = compare_vectors({"a": torch.tensor([[1.0, 0.0]] * 2), "b": torch.tensor([[1.0, 0.0], [1.0, 1.0]])})

    assert found.pairs[0].highest == pytest.approx(1.0)
    assert warnings(caplog) == []


def test_rows_of_zero_have_no_direction_and_bring_no_warning(caplog):
    found = compare_vectors({"a": torch.zeros(2, 4), "b": torch.zeros(2, 4)})

    assert found.parallel == warnings(caplog) == []
    assert found.pairs[0].mean != found.pairs[0].mean


def test_one_expert_alone_is_compared_with_none():
    found = compare_vectors({"public": torch.ones(2, 4)})

    assert found.pairs == []
    assert found.table().splitlines() == ["expert  norm", "public  2.000"]


def test_the_table_shows_every_number():
    table = compare_vectors({"public": torch.tensor([[3.0, 4.0]]), "mathematics": torch.tensor([[4.0, 3.0]])}).table()

    assert table.splitlines() == [
        "expert       norm",
        "public       5.000",
        "mathematics  5.000",
        "",
        "expert       expert         mean     min     max",
        "public       mathematics   0.960   0.960   0.960",
    ]


def test_comparing_changes_nothing():
    model = named_model()
    before = copy.deepcopy(model.state_dict())
    compare_rows(model)

    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())
