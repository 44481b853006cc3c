"""Runs of words as numbers: how a text is found in another, however either is written.

Shapes: T words of a text, G runs of words.
"""

import re
import unicodedata
import zlib

import numpy as np

# Scripts written without spaces count each character as a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")
_BASE = np.uint64(0x9E3779B97F4A7C15)


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
