"""Teaching the classifier from some documents, and measuring it on others.

Shapes: N documents.
"""

import numpy as np
from transformers.utils import logging

from flexolmo_hf.routing.classifier import ProxyClassifier, judged, probability
from flexolmo_hf.routing.classifier_report import ClassifierReport, measure
from flexolmo_hf.routing.embedded import Batch

logger = logging.get_logger(__name__)

# Below this AUC the best documents are hardly better than any others.
_POOR = 0.6


def learn(judge: ProxyClassifier, public: Batch, private: Batch, *, held_out: float, seed: int) -> ClassifierReport:
    """Teach a classifier, and measure it on documents it has not seen.

    Args:
        judge: The classifier; it changes.
        public: Public documents, at least 20.
        private: Private documents, at least 20.
        held_out: Share of each that is kept for measuring.
        seed: Decides which, and all that is random in learning.
    """
    chance = np.random.default_rng(seed)
    seen, unseen = [], []
    for batch in (public, private):
        order = chance.permutation(len(batch)).tolist()
        apart = round(held_out * len(order))
        unseen.append(batch.chosen(order[:apart]))
        seen.append(batch.chosen(order[apart:]))
    train, test = Batch.joined(seen), Batch.joined(unseen)
    judge.fit(train.texts, train.unit_BW, _private(seen), seed=seed)
    report = measure(
        probability(judged(judge, test.texts, test.unit_BW)),
        _private(unseen),
        trained_public=len(seen[0]),
        trained_private=len(seen[1]),
    )
    if report.auc < _POOR:
        logger.warning(
            "The classifier hardly tells private documents from public ones (AUC %.2f on held-out documents): "
            "what it chooses is close to a random choice.",
            report.auc,
        )
    return report


def _private(public_and_private: list[Batch]) -> np.ndarray:
    return np.repeat([False, True], [len(batch) for batch in public_and_private])
