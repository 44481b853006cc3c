"""Decontamination: leave out training documents that share a run of 13 words with a benchmark.

Shapes: G runs of a document's words, N runs of all evaluation texts.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from flexolmo_hf._word_runs import run_hashes
from flexolmo_hf.errors import ConfigurationError

_AT_ONCE = 1 << 20


def document_hash(text: str) -> str:
    """Return the sha256 of a document's UTF-8 bytes, by which reports name it."""
    return hashlib.sha256(text.encode("utf8", "surrogatepass")).hexdigest()


class Decontaminator:
    """Tell documents that share a run of words with an evaluation text.

    Of the evaluation texts only the hashes of their runs are kept, 8 bytes each. A document of fewer than `words` words
    is contaminated if it equals an evaluation text, and an evaluation text of fewer words is found nowhere else.

    Args:
        evaluation_texts: Questions and answers that must not be trained on, such as `evaluation_texts.evaluation_texts`
            reads; read once, one after the other.
        words: Words in a run.

    Raises:
        ConfigurationError: If `words` is not positive, or `evaluation_texts` is one string.
    """

    def __init__(self, evaluation_texts: Iterable[str], *, words: int = 13):
        if words < 1:
            raise ConfigurationError(f"Runs of {words} words cannot be compared.", "Give words=13, or another above 0.")
        if isinstance(evaluation_texts, str):
            raise ConfigurationError("The evaluation texts are one text.", "Give a list of texts.")
        self.words = words
        self._hash_N = _distinct(run_hashes(text, words) for text in evaluation_texts)

    def __len__(self) -> int:
        """Count the distinct runs of the evaluation texts."""
        return len(self._hash_N)

    def fingerprint(self) -> str:
        """Return a sha256 by which two can be told to drop the same documents."""
        return hashlib.sha256(f"{self.words} ".encode() + self._hash_N.tobytes()).hexdigest()

    def is_contaminated(self, text: str) -> bool:
        """Tell whether a document shares a run of words with an evaluation text."""
        if not len(self._hash_N):
            return False
        hash_G = run_hashes(text, self.words)
        nearest_G = np.minimum(np.searchsorted(self._hash_N, hash_G), len(self._hash_N) - 1)
        return bool((self._hash_N[nearest_G] == hash_G).any())

    def split(self, texts: Iterable[str]) -> tuple[list[str], list[str]]:
        """Split documents into those that may be trained on and the names of those that may not.

        Returns:
            The clean documents in order, and the sha256 of each other one, in order.
        """
        clean, dropped = [], []
        for text in texts:
            if self.is_contaminated(text):
                dropped.append(document_hash(text))
            else:
                clean.append(text)
        return clean, dropped


def _distinct(parts: Iterable[np.ndarray]) -> np.ndarray:
    """Return the sorted distinct values of many small arrays, without holding their repetitions at once."""
    known, pending, size = np.zeros(0, np.uint64), [], 0
    for part in parts:
        pending.append(part)
        size += len(part)
        # As many new ones as known ones, so that each is sorted a few times only.
        if size > max(_AT_ONCE, len(known)):
            known, pending, size = np.unique(np.concatenate([known, *pending])), [], 0
    return np.unique(np.concatenate([known, *pending]))
