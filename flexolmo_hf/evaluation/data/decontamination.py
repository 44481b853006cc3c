"""Decontamination: leave out training documents that share a run of 13 words with a benchmark.

Shapes: T words of a text, G runs of words, N runs of all evaluation texts.
"""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable

import numpy as np

from flexolmo_hf.errors import ConfigurationError

# Scripts written without spaces count each character as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)
_AT_ONCE = 1 << 20


def run_hashes(text: str, words: int) -> np.ndarray:
    """Hash every run of `words` words, ignoring case, punctuation, white space and forms of the same character.

    A text of fewer words is one run, which equals no part of a longer text.

    Returns:
        The hashes in the order of the text, shape ``(G,)``, uint64; the same in every process.
    """
    found = _WORDS.findall(unicodedata.normalize("NFKC", text).casefold())
    word_T = np.array([zlib.crc32(word.encode("utf8", "surrogatepass")) for word in found], np.uint64)
    length = min(words, len(found))
    if not length:
        return np.zeros(0, np.uint64)
    # The length stands first: a short text is told from the beginning of another.
    hash_G = np.full(len(found) - length + 1, length, np.uint64)
    for offset in range(length):
        hash_G = hash_G * _BASE + word_T[offset : offset + len(hash_G)] + np.uint64(1)
        hash_G ^= hash_G >> np.uint64(29)
    return hash_G


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
