"""How sure a figure is: bootstrap intervals over documents.

Documents, not tokens, are drawn anew: the tokens of one document are alike, and intervals over tokens would look far
narrower than they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte


@dataclass(frozen=True)
class Interval:
    """Where a figure lies with the level's probability, both ends included."""

    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        """Tell whether a value lies inside."""
        return self.low <= value <= self.high


def bootstrap(documents: Sequence[BitsPerByte], *, samples: int = 1000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the interval of the bits per byte of all documents together.

    Args:
        documents: What one model needs for each document.
        samples: How often the documents are drawn anew, with replacement.
        seed: Of the draws. The same seed and number of documents draw the same documents.
        level: Probability that the interval stands for, between 0 and 1.

    Returns:
        The percentiles of total bits over total bytes.

    Raises:
        ConfigurationError: If there is no document or no draw, or the level is none.
    """
    _refuse(samples, level)
    return _percentiles(_ratios(documents, _draws(len(documents), samples, seed)), level)


def bootstrap_change(
    after: Sequence[BitsPerByte],
    before: Sequence[BitsPerByte],
    *,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Return the interval of the relative change between two measurements of the same documents.

    Both are computed on the same draws, so what makes a document hard for both cancels out.

    Args:
        after: What the one needs for each document.
        before: What the other needs for the same documents in the same order.
        samples: As for `bootstrap`.
        seed: As for `bootstrap`.
        level: As for `bootstrap`.

    Returns:
        The percentiles of ``after / before - 1``.

    Raises:
        ConfigurationError: As for `bootstrap`, and if the documents are not the same.
    """
    _refuse(samples, level)
    if [document.bytes for document in after] != [document.bytes for document in before]:
        raise ConfigurationError(
            "The two measurements are not of the same documents.",
            "A paired interval needs the same documents in the same order.",
        )
    draws = _draws(len(after), samples, seed)
    return _percentiles(_ratios(after, draws) / _ratios(before, draws) - 1, level)


def _refuse(samples: int, level: float) -> None:
    if samples < 1 or not 0 < level < 1:
        raise ConfigurationError(
            f"samples={samples} and level={level} make no interval.",
            "Draw at least once, for a level between 0 and 1, such as 0.95.",
        )


def _draws(documents: int, samples: int, seed: int) -> np.ndarray:
    if not documents:
        raise ConfigurationError("There is no document to draw from.", "An interval needs at least one document.")
    return np.random.default_rng(seed).integers(documents, size=(samples, documents))


def _ratios(documents: Sequence[BitsPerByte], draws: np.ndarray) -> np.ndarray:
    bits = np.array([document.bits for document in documents])
    sizes = np.array([document.bytes for document in documents])
    ratios: np.ndarray = bits[draws].sum(1) / sizes[draws].sum(1)
    return ratios


def _percentiles(values: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
