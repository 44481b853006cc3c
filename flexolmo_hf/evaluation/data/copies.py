"""Finding documents that repeat earlier ones, word for word or nearly so, in little memory.

Shapes: T words of a text, G runs of eight words.
"""

import hashlib
import zlib

import numpy as np

_RUN = 8
_BASE = np.uint64(0x9E3779B97F4A7C15)
_MIX = np.uint64(0xBF58476D1CE4E5B9)
# 32 MB of bits, three for each run: after ten million runs, about one in a thousand others seems to be known already.
_BITS = 28


class SeenText:
    """Remembers the runs of eight words of the documents that were added.

    A Bloom filter: a run that was added is always known, and few others are. Documents of fewer than nine words are
    one run and are remembered by their hash, so none of them is taken for a copy by chance.
    """

    def __init__(self) -> None:
        self._bits = np.zeros(1 << (_BITS - 3), np.uint8)
        self._short: set[bytes] = set()

    def add_unless_copy(self, text: str, *, most_shared: float = 0.5) -> bool:
        """Add a document unless more than a share of its runs of eight words is known.

        Args:
            text: The document.
            most_shared: The largest share that makes no copy.

        Returns:
            Whether it was added.
        """
        words = text.split()
        if len(words) <= _RUN:
            return self._add_short(words)
        place_3G = _places(words)
        byte_3G, bit_3G = place_3G >> np.uint64(3), (1 << (place_3G & np.uint64(7))).astype(np.uint8)
        known_G = (self._bits[byte_3G] & bit_3G).astype(bool).all(axis=0)
        if known_G.mean() > most_shared:
            return False
        np.bitwise_or.at(self._bits, byte_3G, bit_3G)
        return True

    def _add_short(self, words: list[str]) -> bool:
        name = hashlib.blake2b(" ".join(words).encode("utf8", "surrogatepass"), digest_size=8).digest()
        new = name not in self._short
        self._short.add(name)
        return new


def _places(words: list[str]) -> np.ndarray:
    """Say which bits belong to each distinct run of eight words, shape ``(3, G)``."""
    word_T = np.array([zlib.crc32(word.encode("utf8", "surrogatepass")) for word in words], np.uint64)
    hash_G = np.zeros(len(words) - _RUN + 1, np.uint64)
    for offset in range(_RUN):
        hash_G = (hash_G + word_T[offset : offset + len(hash_G)] + np.uint64(1)) * _BASE
        hash_G ^= hash_G >> np.uint64(31)
    hash_G = np.unique(hash_G)
    second_G = (hash_G * _MIX) | np.uint64(1)
    return np.stack([(hash_G + np.uint64(n) * second_G) >> np.uint64(64 - _BITS) for n in range(3)])
