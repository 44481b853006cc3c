"""The projection is orthonormal and the same for everybody who has its seed."""

import pytest
import torch

from flexolmo_hf.routing.projection import orthonormal_projection

PINNED = [[0.534952629762, -0.169930152381], [-0.756360839201, 0.340183782383], [-0.376488996962, -0.924877687868]]
SIZES = pytest.mark.parametrize(("width", "hidden"), [(48, 64), (64, 48), (1, 5), (5, 1), (7, 7)])


@SIZES
def test_its_rows_or_columns_are_orthonormal(width, hidden):
    matrix = orthonormal_projection(width, hidden, seed=0)
    gram = matrix @ matrix.T if width <= hidden else matrix.T @ matrix

    assert matrix.shape == (width, hidden)
    assert torch.allclose(gram, torch.eye(min(width, hidden), dtype=torch.float64), atol=1e-12)


def test_towards_a_larger_size_all_norms_and_angles_stay():
    vectors = torch.randn(20, 48, dtype=torch.float64)
    projected = vectors @ orthonormal_projection(48, 64, seed=3)

    assert torch.allclose(projected @ projected.T, vectors @ vectors.T, atol=1e-10)


@SIZES
def test_the_same_seed_gives_the_same_numbers_whatever_was_drawn_before(width, hidden):
    first = orthonormal_projection(width, hidden, seed=5)
    torch.randn(100)

    assert torch.equal(orthonormal_projection(width, hidden, seed=5), first)


def test_the_default_dtype_and_device_change_nothing():
    expected = orthonormal_projection(6, 9, seed=5)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = orthonormal_projection(6, 9, seed=5)
    finally:
        torch.set_default_dtype(torch.float32)

    assert torch.equal(found, expected)


def test_another_seed_gives_other_numbers():
    assert not torch.allclose(orthonormal_projection(6, 9, seed=0), orthonormal_projection(6, 9, seed=1), atol=0.1)


def test_the_numbers_of_seed_0_are_those_that_owners_have_used():
    # Were they to change with a library, owners with two versions would make rows that do not fit.
    matrix = orthonormal_projection(3, 2, seed=0)

    assert matrix.tolist() == [pytest.approx(row, abs=1e-9) for row in PINNED]


def test_the_sign_of_each_direction_is_that_of_the_drawn_numbers():
    # QR leaves the signs to the implementation: without fixing them, two machines may differ.
    gaussian = torch.randn(9, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    upper = orthonormal_projection(9, 6, seed=2).T @ gaussian

    assert (upper.diagonal() > 0).all()
    assert torch.allclose(upper.tril(-1), torch.zeros(6, 6, dtype=torch.float64), atol=1e-12)
