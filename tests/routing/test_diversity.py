"""The greedy choice is the one that computing every determinant would find, and relevance and difference both count."""

from itertools import combinations

import numpy as np
import pytest

from flexolmo_hf.routing.diversity import greedy_map, pick_diverse


def kernel(size, rank=None, seed=0):
    factor = np.random.default_rng(seed).normal(size=(size, rank or size))
    return factor @ factor.T


def log_determinant(matrix, chosen):
    return np.linalg.slogdet(matrix[np.ix_(chosen, chosen)])[1]


def units(count, width, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("seed", range(5))
def test_each_step_takes_what_the_determinants_themselves_say(seed):
    matrix = kernel(9, seed=seed)
    expected = []
    for _ in range(6):
        rest = [i for i in range(9) if i not in expected]
        expected.append(max(rest, key=lambda i: log_determinant(matrix, [*expected, i])))

    assert greedy_map(np.diag(matrix), matrix.__getitem__, 6) == expected


@pytest.mark.parametrize("seed", range(5))
def test_the_greedy_set_is_within_the_known_bound_of_the_best_set(seed):
    # With eigenvalues of 1 and more, no document lowers the determinant, and 1 - 1/e of the best is certain.
    matrix = kernel(8, seed=seed) + np.eye(8)
    best = max(log_determinant(matrix, list(chosen)) for chosen in combinations(range(8), 4))

    assert log_determinant(matrix, greedy_map(np.diag(matrix), matrix.__getitem__, 4)) >= (1 - 1 / np.e) * best


def test_no_more_is_found_than_the_rank_of_the_kernel_allows():
    matrix = kernel(8, rank=3)

    assert len(greedy_map(np.diag(matrix), matrix.__getitem__, 8)) == 3


def test_more_documents_can_be_picked_than_the_encoder_is_wide():
    picked = pick_diverse(np.full(40, 0.9), units(40, 4), 40)

    assert sorted(picked) == list(range(40))


def test_of_equally_relevant_documents_a_copy_comes_last():
    unit_MW = units(6, 16)
    unit_MW[4] = unit_MW[1]

    assert pick_diverse(np.full(6, 0.9), unit_MW, 6)[-1] in (1, 4)


def test_relevance_beats_difference_when_it_weighs_enough():
    relevance = np.array([0.9, 0.91, 0.1])
    near = units(3, 16)
    near[1] = near[0] + 0.3 * near[1]
    near[1] /= np.linalg.norm(near[1])

    assert set(pick_diverse(relevance, near, 2, weight=0.0)) == {0, 2}
    assert set(pick_diverse(relevance, near, 2, weight=20.0)) == {0, 1}


def test_a_pick_is_the_greedy_choice_under_the_kernel_that_is_documented():
    relevance, unit_MW = np.random.default_rng(1).uniform(size=40), units(40, 3)
    quality = np.exp(0.5 * 3.0 * relevance)
    picks = []
    for reach in (0.05, 2.0):
        matrix = quality[:, None] * np.exp((unit_MW @ unit_MW.T - 1) / reach) * quality
        picks.append(pick_diverse(relevance, unit_MW, 7, weight=3.0, reach=reach))

        assert picks[-1] == greedy_map(np.diag(matrix), matrix.__getitem__, 7)
    assert picks[0] != picks[1]
