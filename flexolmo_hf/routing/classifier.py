"""The classifier that tells private documents from public ones; the paper's section on proxy data.

Shapes: N documents, W width of the encoder.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class ProxyClassifier(Protocol):
    """What `select_proxy` asks of a classifier."""

    def fit(self, texts: Sequence[str], unit_NW: np.ndarray, private_N: np.ndarray, *, seed: int) -> None:
        """Learn from documents.

        Both kinds count the same, however many there are of each.

        Args:
            texts: The documents.
            unit_NW: Their embeddings, of length 1.
            private_N: Whether each is private.
            seed: Decides everything that is random.
        """

    def log_odds(self, texts: Sequence[str], unit_NW: np.ndarray) -> np.ndarray:
        """Judge documents: the logarithm of the odds that each is private, shape ``(N,)``.

        Log-odds and not probabilities, because thousands of documents may have a probability that rounds to 1.
        """


class LogisticClassifier:
    """Logistic regression on standardised embeddings."""

    def fit(self, texts: Sequence[str], unit_NW: np.ndarray, private_N: np.ndarray, *, seed: int) -> None:
        """Learn from embeddings; the texts are not looked at."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        # The entries of a vector of length 1 are small, and a penalty on the weights would hold back a small scale.
        model = make_pipeline(
            StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, random_state=seed)
        )
        self._model = model.fit(unit_NW.astype(np.float64), private_N)

    def log_odds(self, texts: Sequence[str], unit_NW: np.ndarray) -> np.ndarray:
        """Judge embeddings; the texts are not looked at."""
        return self._model.decision_function(unit_NW.astype(np.float64))


def probability(log_odds_N: np.ndarray) -> np.ndarray:
    """Turn log-odds into probabilities, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(log_odds_N, dtype=np.float64)))
