"""Documents as windows of tokens: how every measurement of held-out text cuts and batches them.

Shape letters: B windows in a batch, T tokens of the longest.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError

# Tokens in a window where nobody gives a number and the model has as many positions.
_DEFAULT_LENGTH = 1024


class Window(NamedTuple):
    """A part of a document.

    Attributes:
        document: Position of the document among those that were cut.
        tokens: Token ids. The first is context and not scored, all others are.
    """

    document: int
    tokens: list[int]


def window_length(config: Any, max_length: int | None) -> int:
    """Return how many tokens a window has: as many as are asked for, else 1,024 or a model's fewer positions.

    Args:
        config: The model's settings; without ``max_position_embeddings`` it has any number of positions.
        max_length: Tokens that are asked for; None for the default.
    """
    if max_length is not None:
        return max_length
    positions = _positions(config)
    return _DEFAULT_LENGTH if positions is None else min(_DEFAULT_LENGTH, positions)


def _positions(config: Any) -> int | None:
    positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions


def refuse_sizes(max_length: int | None, batch_size: int) -> None:
    """Refuse sizes that leave nothing to score.

    Args:
        max_length: Tokens in a window; None while the model that will say is not loaded.
        batch_size: Windows in a batch.

    Raises:
        ConfigurationError: If a window has no token beside its context, or a batch no window.
    """
    if (max_length is not None and max_length < 2) or batch_size < 1:
        raise ConfigurationError(
            f"max_length={max_length} and batch_size={batch_size} leave nothing to score.",
            "A window needs at least 2 tokens (one is context), a batch at least 1 window.",
        )


def refuse_beyond(config: Any, longest: int) -> None:
    """Refuse windows with more tokens than a model has positions: what it makes of the rest says nothing about it.

    Args:
        config: The model's settings; without ``max_position_embeddings`` any length is its own.
        longest: Tokens of the longest window.

    Raises:
        ConfigurationError: If one is too long.
    """
    positions = _positions(config)
    if positions is not None and longest > positions:
        raise ConfigurationError(
            f"A window has {longest} tokens, but the model has {positions} positions.",
            f"Give at most {positions} as max_length (--max-length), or leave it out.",
        )


def refuse_one_string(texts: Any, whose: str = "") -> None:
    """Refuse one text where many are meant: each of its characters would be taken for a document.

    Raises:
        ConfigurationError: If it is one.
    """
    if isinstance(texts, (str, bytes)):
        raise ConfigurationError(f"The texts{whose} are one string.", "Give a list of documents.")


def start_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that stands before a document: BOS or, without one, EOS.

    Raises:
        ConfigurationError: If the tokenizer has neither.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ConfigurationError(
            "The tokenizer has neither BOS nor EOS: nothing stands before a document to predict its first token.",
            "Set tokenizer.eos_token to the token that ended documents in training.",
        )
    return int(start)


def cut_into_windows(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], max_length: int) -> Iterator[Window]:
    """Cut documents, one after the other, so that every token is scored in exactly one window.

    A document's first window begins with the token that stands before a document, each other one with the last token of
    the one before. An empty text has no window.

    Args:
        tokenizer: The model's.
        texts: Documents.
        max_length: Tokens in a window, its first included; at least 2, see `refuse_sizes`.

    Raises:
        ConfigurationError: If the tokenizer has neither BOS nor EOS.
    """
    start, step = start_token(tokenizer), max_length - 1
    for index, text in enumerate(texts):
        tokens = [start, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        yield from (Window(index, tokens[i : i + max_length]) for i in range(0, len(tokens) - 1, step))


def batched_by_length(windows: Iterable[Window], batch_size: int) -> Iterator[list[Window]]:
    """Batch windows, the longest first, so that those of one batch are about equally long."""
    longest_first = sorted(windows, key=lambda window: len(window.tokens), reverse=True)
    return (longest_first[i : i + batch_size] for i in range(0, len(longest_first), batch_size))


def padded(batch: Sequence[Window], *, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids of a batch and their mask, 1 for tokens and 0 for padding, both ``(B, T)``, int64."""
    shape = (len(batch), max(len(window.tokens) for window in batch))
    # What stands in the padding is never read: attention masks it. Every model has token 0.
    ids_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    for row, window in enumerate(batch):
        size = len(window.tokens)
        place = slice(shape[1] - size, None) if left else slice(size)
        ids_BT[row, place] = torch.tensor(window.tokens)
        mask_BT[row, place] = 1
    return ids_BT, mask_BT
