"""Repetitions: a memory of texts that stays small, however many there are."""

import hashlib
import math
import re

import numpy as np

from flexolmo_hf.errors import ConfigurationError

_SPACE = re.compile(r"\s+")


class SeenTexts:
    """Remembers texts in a Bloom filter.

    Texts that differ in case or white space only are the same. A text that was seen is always known; one that was not
    is taken for known with a small probability, which reaches `error` when `texts` texts were added.

    Args:
        texts: How many texts it is made for.
        error: See above. 2.4 bytes per text at 1e-4.
    """

    def __init__(self, texts: int, error: float):
        bits = math.ceil(-texts * math.log(error) / math.log(2) ** 2)
        # Whole words of 64 bits, and at least one.
        self._bits = np.zeros(-(-bits // 64), np.uint64)
        self._probes = max(1, round(-math.log2(error)))
        self._room = texts

    @property
    def size_in_bytes(self) -> int:
        """Memory that it takes."""
        return self._bits.nbytes

    def add(self, text: str) -> bool:
        """Remember a text; tell whether it was new.

        Raises:
            ConfigurationError: If it is new and one too many: from there on, ever more texts would pass for known.
        """
        words, masks = self._places(text)
        new = not (self._bits[words] & masks).all()
        self._room -= int(new)
        if self._room < 0:
            raise ConfigurationError(
                "The corpus has more documents than the recipe's `documents` says.",
                "Raise it, and start anew: 2.4 bytes of memory for each, at the default repetition_error.",
            )
        # Two probes may fall into one word: `|=` with an index would keep the last.
        np.bitwise_or.at(self._bits, words, masks)
        return new

    def _places(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        plain = _SPACE.sub(" ", text).strip().lower()
        digest = hashlib.blake2b(plain.encode("utf8", "surrogatepass"), digest_size=16).digest()
        first, second = np.frombuffer(digest, "<u8")
        with np.errstate(over="ignore"):
            probes = first + np.arange(self._probes, dtype=np.uint64) * (second | np.uint64(1))
        places = probes % np.uint64(len(self._bits) * 64)
        return places // np.uint64(64), np.uint64(1) << places % np.uint64(64)
