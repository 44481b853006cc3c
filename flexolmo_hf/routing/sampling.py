"""A sample of a stream of texts that need not fit into memory."""

import random
from collections.abc import Iterable

from flexolmo_hf.errors import ConfigurationError


def sample_texts(texts: Iterable[str], *, sample: int, seed: int) -> tuple[list[str], int]:
    """Draw texts uniformly, without replacement, in one pass; texts without a visible character take no part.

    Args:
        texts: Any number of them.
        sample: How many to draw at most, and the most that are in memory at a time.
        seed: Which; the same texts in the same order give the same sample.

    Returns:
        The sample, and how many empty texts were left out.

    Raises:
        ConfigurationError: If `sample` is less than 1, or a text is no text.
    """
    if sample < 1:
        raise ConfigurationError(f"sample is {sample}.", "At least 1 document is needed.")
    if isinstance(texts, (str, bytes)):
        raise ConfigurationError("One text was given where a row of texts is needed.", "Put it into a list.")
    chance = random.Random(seed)
    kept: list[str] = []
    seen = empty = 0
    for text in texts:
        if not isinstance(text, str):
            raise ConfigurationError(f"A {type(text).__name__} stands where a text is needed.", "Give strings.")
        if not text.strip():
            empty += 1
            continue
        seen += 1
        if len(kept) < sample:
            kept.append(text)
        elif (slot := chance.randrange(seen)) < sample:
            kept[slot] = text
    return kept, empty
