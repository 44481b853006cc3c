"""Bits per byte: how many bits a model needs for each byte of a text it has not seen. Lower is better.

Unlike perplexity it compares models with different tokenizers: a text has the same bytes however it is cut.

Shapes: B windows in a batch, T tokens in a window, V vocabulary.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.windows import (
    Window,
    batched_by_length,
    cut_into_windows,
    padded,
    refuse_beyond,
    refuse_one_string,
    refuse_sizes,
    window_length,
)

_IGNORED = -100


class BitsPerByte(float):
    """The measured value, which is a float, with what it was measured on.

    Attributes:
        bits: Bits the model needs for all texts.
        bytes: UTF-8 bytes of all texts.
        tokens: Tokens scored.
    """

    bits: float
    bytes: int
    tokens: int

    def __new__(cls, bits: float, bytes: int, tokens: int) -> "BitsPerByte":
        """Divide the bits by the bytes."""
        value = super().__new__(cls, bits / bytes)
        value.bits, value.bytes, value.tokens = bits, bytes, tokens
        return value

    def __reduce__(self) -> tuple[type, tuple[float, int, int]]:
        """Give what a copy needs."""
        return BitsPerByte, (self.bits, self.bytes, self.tokens)


def bits_per_byte(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    **call: Any,
) -> BitsPerByte:
    """Measure the bits per byte of a causal language model on texts.

    Every token of every text is scored exactly once, given the tokens before it in its window. A document longer than
    `max_length` is cut into windows that share no scored token; each begins with the last token of the one before, as
    context. The first window begins with the tokenizer's BOS token or, without one, its EOS token: what a model sees
    before a new document. That token and padding are never scored, and nothing is added at the end. The bytes are those
    of the texts as given.

    Args:
        model: The model. It is put into evaluation mode for the measurement.
        tokenizer: Its tokenizer.
        texts: Documents.
        max_length: Tokens in a window, the context token included, at least 2. None for 1,024, or as many as the model
            has positions if these are fewer.
        batch_size: Windows the model reads at once. Windows of similar length share a batch.
        **call: Passed on to the model's forward, such as ``active_experts=["public"]``.

    Returns:
        Total bits over total bytes.

    Raises:
        ConfigurationError: If a size is too small, or a window longer than the model has positions; if there is no
            text or one instead of a list; if the tokenizer has neither BOS nor EOS.
    """
    if not any(texts):
        raise ConfigurationError("There is no text to score.", "Give at least one document that is not empty.")
    return together(bits_by_document(model, tokenizer, texts, max_length=max_length, batch_size=batch_size, **call))


def bits_by_document(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    **call: Any,
) -> list[BitsPerByte]:
    """Measure every document by itself, as `bits_per_byte` measures all together; takes and raises the same.

    Returns:
        One value per text, in order. Empty texts have none and are left out.
    """
    refuse_one_string(texts)
    max_length = window_length(model.config, max_length)
    refuse_sizes(max_length, batch_size)
    texts = [text for text in texts if text]
    windows = list(cut_into_windows(tokenizer, texts, max_length))
    bits, tokens = [0.0] * len(texts), [0] * len(texts)
    was_training = model.training
    model.eval()
    try:
        for batch in batched_by_length(windows, batch_size):
            for window, found in zip(batch, bits_of_windows(model, batch, **call), strict=True):
                bits[window.document] += found
                tokens[window.document] += len(window.tokens) - 1
    finally:
        model.train(was_training)
    sizes = [len(text.encode()) for text in texts]
    return [BitsPerByte(*document) for document in zip(bits, sizes, tokens, strict=True)]


def together(documents: Iterable[BitsPerByte]) -> BitsPerByte:
    """Join what documents need into the value of all of them: total bits over total bytes."""
    documents = list(documents)
    return BitsPerByte(
        math.fsum(document.bits for document in documents),
        sum(document.bytes for document in documents),
        sum(document.tokens for document in documents),
    )


@torch.no_grad()
def bits_of_windows(model: PreTrainedModel, batch: Sequence[Window], **call: Any) -> list[float]:
    """Return the bits that a model needs for the scored tokens of each window of a batch.

    Raises:
        ConfigurationError: If a window is longer than the model has positions.
    """
    ids_BT, mask_BT = padded(batch)
    refuse_beyond(model.config, ids_BT.shape[1])
    labels_BT = ids_BT.masked_fill(mask_BT == 0, _IGNORED)
    logits_BTV = model(
        input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device), use_cache=False, **call
    ).logits
    nats_BT = torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).float(),
        labels_BT[:, 1:].flatten().to(logits_BTV.device),
        ignore_index=_IGNORED,
        reduction="none",
    ).view(len(batch), -1)
    bits: list[float] = (nats_BT.double().sum(1) / math.log(2)).tolist()
    return bits
