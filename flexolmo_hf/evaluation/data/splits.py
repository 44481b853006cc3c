"""Splitting by document: no document, and no near copy of one, is in two splits."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.copies import SeenText


def without_copies(texts: Iterable[str], *, most_shared: float = 0.5) -> list[str]:
    """Drop documents that repeat earlier ones, word for word or nearly so.

    Args:
        texts: Documents, in order.
        most_shared: Largest share of a document's runs of eight words that earlier documents may already hold.

    Returns:
        The documents that stay, in order.
    """
    seen = SeenText()
    return [text for text in texts if seen.add_unless_copy(text, most_shared=most_shared)]


def size_in_bytes(texts: Iterable[str]) -> int:
    """Count the UTF-8 bytes of all texts."""
    return sum(len(text.encode()) for text in texts)


@dataclass
class Shelf:
    """One source's documents in a fixed random order, handed out without replacement."""

    name: str
    texts: list[str]

    @classmethod
    def shuffled(cls, name: str, texts: Sequence[str], *, seed: int) -> "Shelf":
        """Put the documents in the order that `seed` decides."""
        return cls(name, random.Random(seed).sample(list(texts), len(texts)))

    def take(self, budget: int) -> list[str]:
        """Hand out the next documents, exactly `budget` bytes of them.

        The last one is cut to fit, so that budgets are equal whatever the length of a source's documents. Nobody gets
        its rest, and a character that would be cut in two is left out.

        Raises:
            ConfigurationError: If fewer than `budget` bytes are left.
        """
        left = size_in_bytes(self.texts)
        if left < budget:
            raise ConfigurationError(
                f"The source {self.name!r} has {left:,} bytes left where {budget:,} are wanted.",
                "The demo's budgets fit its pinned data packages and a complete standard library: use a full Python.",
            )
        taken = []
        while budget > 0:
            text = self.texts.pop(0)
            taken.append(_cut(text, budget))
            budget -= size_in_bytes([text])
        return taken


def _cut(text: str, longest: int) -> str:
    return text.encode()[:longest].decode(errors="ignore")
