"""Documents cut into batches of token windows, a few batches in memory at a time.

Shape letters: B windows in a batch, T tokens of the longest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from transformers import PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.windows import Window, cut_into_windows, padded, refuse_one_string

# Windows of similar length share a batch; the more are sorted at once, the less padding there is.
_BATCHES_SORTED_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class Batch:
    """Some windows of tokens.

    Attributes:
        ids: Token ids, ``(B, T)``.
        mask: 1 for tokens, 0 for padding, ``(B, T)``.
        position: How many tokens of its window stand before each, ``(B, T)``. 0 for the first of a window, which is
            context and not counted, and for padding.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    position: torch.Tensor


class Documents:
    """Documents of one domain on their way through, counted.

    Attributes:
        read: How many have been read that hold any text.
    """

    def __init__(self, domain: str, texts: Iterable[str]):
        refuse_one_string(texts, f" of domain {domain!r}")
        self.domain, self.texts, self.read = domain, texts, 0

    def __iter__(self) -> Iterator[str]:
        """Yield those that are not empty.

        Raises:
            ConfigurationError: If one is no string.
        """
        for text in self.texts:
            if not isinstance(text, str):
                raise ConfigurationError(
                    f"A document of domain {self.domain!r} is of type {type(text).__name__!r}.",
                    "Give documents as strings, such as dataset['text'].",
                )
            if text:
                self.read += 1
                yield text


def batches(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], *, max_length: int, batch_size: int
) -> Iterator[Batch]:
    """Cut documents into windows as `bits_per_byte` does, and batch them.

    Every token of every text is in exactly one window as more than its first token. The first window of a document
    begins with the tokenizer's BOS or EOS token, each other one with the last token of the one before.

    Args:
        tokenizer: The model's. Its ``padding_side`` is kept to.
        texts: Documents; read one after the other.
        max_length: Tokens in a window, its first included.
        batch_size: Windows in a batch.

    Raises:
        ConfigurationError: If the tokenizer has neither BOS nor EOS.
    """
    windows = cut_into_windows(tokenizer, texts, max_length)
    left = tokenizer.padding_side == "left"
    while some := list(islice(windows, batch_size * _BATCHES_SORTED_AT_ONCE)):
        some.sort(key=lambda window: len(window.tokens), reverse=True)
        for start in range(0, len(some), batch_size):
            yield _batch(some[start : start + batch_size], left=left)


def _batch(windows: list[Window], *, left: bool) -> Batch:
    ids_BT, mask_BT = padded(windows, left=left)
    # Counts the tokens of a row, wherever its padding is.
    return Batch(ids_BT, mask_BT, (mask_BT.cumsum(1) - 1).clamp(min=0) * mask_BT)
