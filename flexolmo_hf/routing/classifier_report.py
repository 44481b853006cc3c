"""How well the classifier knows what it says, on documents it has not seen.

Shapes: N held-out documents.
"""

from dataclasses import dataclass

import numpy as np

_BINS = 10


@dataclass(frozen=True)
class CalibrationBin:
    """Held-out documents whose predicted probability lies between two bounds.

    Attributes:
        lower: Lower bound, included.
        upper: Upper bound, excluded but for 1.
        mean_predicted: Mean of the predicted probabilities.
        fraction_private: How many of the documents are private, both kinds counting the same.
        count: Documents.
    """

    lower: float
    upper: float
    mean_predicted: float
    fraction_private: float
    count: int


@dataclass(frozen=True)
class ClassifierReport:
    """What the classifier is worth. Both kinds count the same in every figure, however many documents there are.

    Attributes:
        accuracy: Fraction of held-out documents told right; 0.5 is chance.
        auc: Chance that a private document is scored above a public one.
        calibration_error: Mean distance between predicted probability and fraction (ECE, 10 bins).
        trained_public: Public documents learned from.
        trained_private: Private documents learned from.
        held_out_public: Public documents measured on.
        held_out_private: Private documents measured on.
        calibration: The bins that are not empty.
    """

    accuracy: float
    auc: float
    calibration_error: float
    trained_public: int
    trained_private: int
    held_out_public: int
    held_out_private: int
    calibration: tuple[CalibrationBin, ...]


def measure(
    probability_N: np.ndarray, private_N: np.ndarray, *, trained_public: int, trained_private: int
) -> ClassifierReport:
    """Measure a classifier on held-out documents.

    Args:
        probability_N: The predicted probability that each is private.
        private_N: Whether it is.
        trained_public: Goes into the report.
        trained_private: Goes into the report.
    """
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    private_N = private_N.astype(bool)
    held_out_private = int(private_N.sum())
    held_out_public = len(private_N) - held_out_private
    # The classifier answers for a world in which both kinds are equally frequent.
    weight_N = np.where(private_N, 0.5 / held_out_private, 0.5 / held_out_public)
    bins, error = _calibration(probability_N, private_N, weight_N)
    return ClassifierReport(
        accuracy=float(balanced_accuracy_score(private_N, probability_N >= 0.5)),
        auc=float(roc_auc_score(private_N, probability_N)),
        calibration_error=error,
        trained_public=trained_public,
        trained_private=trained_private,
        held_out_public=held_out_public,
        held_out_private=held_out_private,
        calibration=bins,
    )


def _calibration(
    probability_N: np.ndarray, private_N: np.ndarray, weight_N: np.ndarray
) -> tuple[tuple[CalibrationBin, ...], float]:
    bin_N = np.minimum((probability_N * _BINS).astype(int), _BINS - 1)
    bins, error = [], 0.0
    for place in np.unique(bin_N):
        inside = bin_N == place
        predicted = float(np.average(probability_N[inside], weights=weight_N[inside]))
        fraction = float(np.average(private_N[inside], weights=weight_N[inside]))
        error += float(weight_N[inside].sum()) * abs(predicted - fraction)
        bounds = float(place) / _BINS, float(place + 1) / _BINS
        bins.append(CalibrationBin(*bounds, predicted, fraction, int(inside.sum())))
    return tuple(bins), error
