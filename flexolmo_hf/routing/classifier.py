"""The classifier that tells private documents from public ones; the paper's section on proxy data.

Shapes: N documents, W width of the encoder.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from flexolmo_hf.errors import ConfigurationError


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


@dataclass
class LogisticClassifier:
    """Logistic regression on embeddings.

    The public documents are assumed to hold some that look private: those are what is searched for. A regression that
    is free enough learns to tell even these apart. So the embeddings keep their length of 1, and the penalty on the
    weights is felt; standardised first, the regression is as accurate on held-out documents and finds far fewer.

    Args:
        freedom: Inverse of the penalty on the weights, scikit-learn's ``C``.
    """

    freedom: float = 1.0

    def fit(self, texts: Sequence[str], unit_NW: np.ndarray, private_N: np.ndarray, *, seed: int) -> None:
        """Learn from embeddings; the texts are not looked at."""
        from sklearn.linear_model import LogisticRegression

        model = LogisticRegression(C=self.freedom, class_weight="balanced", max_iter=2000, random_state=seed)
        self._model = model.fit(unit_NW.astype(np.float64), private_N)

    def log_odds(self, texts: Sequence[str], unit_NW: np.ndarray) -> np.ndarray:
        """Judge embeddings; the texts are not looked at."""
        return self._model.decision_function(unit_NW.astype(np.float64))


def judged(judge: ProxyClassifier, texts: Sequence[str], unit_NW: np.ndarray) -> np.ndarray:
    """Ask a classifier, and check what it answers.

    Raises:
        ConfigurationError: If it is not one finite number for each text.
    """
    found_N = np.asarray(judge.log_odds(texts, unit_NW), dtype=np.float64)
    if found_N.shape != (len(texts),) or not np.isfinite(found_N).all():
        raise ConfigurationError(
            f"For {len(texts)} documents the classifier returned {found_N.shape} log-odds, "
            f"{int((~np.isfinite(found_N)).sum())} of them not finite.",
            "It returns one finite number for each; if it was fine-tuned, lower its learning rate.",
        )
    return found_N


def probability(log_odds_N: np.ndarray) -> np.ndarray:
    """Turn log-odds into probabilities, without overflow."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(log_odds_N, dtype=np.float64)))
