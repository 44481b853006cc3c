"""The classifier's answers and the figures that say how far to trust them."""

import numpy as np
import pytest

from flexolmo_hf.routing.classifier import LogisticClassifier, probability
from flexolmo_hf.routing.classifier_report import measure

sklearn = pytest.importorskip("sklearn")


def two_clouds(public, private, *, apart, seed=0, width=8):
    """Points around two centres, made to length 1."""
    chance = np.random.default_rng(seed)
    rows = chance.normal(size=(public + private, width))
    rows[public:, 0] += apart
    return rows / np.linalg.norm(rows, axis=1, keepdims=True), np.arange(public + private) >= public


def test_a_probability_is_the_logistic_function_and_does_not_overflow():
    found = probability(np.array([-1e4, -2.0, 0.0, 2.0, 1e4]))

    assert found == pytest.approx([0, 1 / (1 + np.e**2), 0.5, 1 / (1 + np.e**-2), 1])


def test_documents_too_sure_to_tell_apart_by_probability_are_told_apart_by_log_odds():
    points, private = two_clouds(200, 200, apart=30.0, width=4)
    judge = LogisticClassifier()
    judge.fit([""] * 400, points, private, seed=0)
    far = judge.log_odds([""], np.array([[1e3, 0, 0, 0]])), judge.log_odds([""], np.array([[2e3, 0, 0, 0]]))

    assert probability(far[0]) == probability(far[1]) == 1.0
    assert far[1] > far[0]


def test_few_private_documents_among_many_public_ones_count_the_same():
    # The same clouds, one of them with few points: the boundary stays between them.
    many, private = two_clouds(2000, 100, apart=2.0)
    judge = LogisticClassifier()
    judge.fit([""] * len(many), many, private, seed=0)
    points, truth = two_clouds(1000, 1000, apart=2.0, seed=1)
    right = (judge.log_odds([""] * 2000, points) > 0) == truth

    assert abs(right[truth].mean() - right[~truth].mean()) < 0.1
    assert judge.log_odds([""] * 2000, points)[~truth].mean() < 0


def test_the_figures_are_those_worked_out_by_hand():
    # Public documents 0.1, 0.2, 0.8, 1.0; private documents 0.85, 0.15. Public ones weigh 1/8 each, private ones 1/4.
    predicted = np.array([0.1, 0.2, 0.8, 1.0, 0.85, 0.15])
    report = measure(predicted, np.array([0, 0, 0, 0, 1, 1]), trained_public=7, trained_private=8)
    bins = {b.lower: (b.upper, b.mean_predicted, b.fraction_private, b.count) for b in report.calibration}

    assert report.accuracy == 0.5
    # Of 8 pairs of a private and a public document: 0.85 is above 3 public ones, 0.15 above 1.
    assert report.auc == 4 / 8
    assert bins[0.1] == (0.2, pytest.approx((0.1 / 8 + 0.15 / 4) / (3 / 8)), pytest.approx((1 / 4) / (3 / 8)), 2)
    assert bins[0.2] == (0.3, pytest.approx(0.2), 0.0, 1)
    assert bins[0.8] == (0.9, pytest.approx((0.8 / 8 + 0.85 / 4) / (3 / 8)), pytest.approx(2 / 3), 2)
    assert bins[0.9] == (1.0, 1.0, 0.0, 1)
    assert report.calibration_error == pytest.approx(sum(w * abs(bins[low][1] - bins[low][2]) for low, w in WEIGHTS))
    assert (report.trained_public, report.trained_private) == (7, 8)
    assert (report.held_out_public, report.held_out_private) == (4, 2)


WEIGHTS = [(0.1, 3 / 8), (0.2, 1 / 8), (0.8, 3 / 8), (0.9, 1 / 8)]


def test_a_classifier_that_says_what_is_so_has_no_calibration_error():
    chance = np.random.default_rng(0)
    predicted = chance.uniform(size=20000)
    report = measure(predicted, chance.uniform(size=20000) < predicted, trained_public=0, trained_private=0)

    assert report.calibration_error < 0.02
    assert len(report.calibration) == 10
    # The best there can be for such probabilities.
    assert report.accuracy == pytest.approx(0.75, abs=0.02)
