"""From contexts and continuations to the tokens that are read and those that are scored."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError


@dataclass(frozen=True)
class Request:
    """A continuation to be scored, and what stands before it.

    Attributes:
        context: May be empty: the continuation then begins a document.
        continuation: Not empty.
    """

    context: str
    continuation: str


@dataclass(frozen=True)
class Piece:
    """Tokens for a model, and those it is asked about.

    Attributes:
        request: The position of the request it belongs to.
        inputs: Tokens to read, int64.
        targets: Tokens to score; the last of them follows the last input.
        prompt: How many of the inputs come before the first token that is scored; 0 if the request has no context.
    """

    request: int
    inputs: np.ndarray
    targets: tuple[int, ...]
    prompt: int


def at_the_border(request: Request) -> Request:
    """Move the white space at the end of a context to the continuation, where tokenizers have it."""
    context = request.context.rstrip()
    return Request(context, request.context[len(context) :] + request.continuation)


def encode(tokenizer: PreTrainedTokenizerBase, requests: Sequence[Request], max_length: int) -> list[Piece]:
    """Turn requests into tokens, as lm-evaluation-harness does.

    Context and continuation are cut together, and the continuation is what is left after as many tokens as the context
    alone has; white space at the end of the context belongs to it. An empty context is the token that begins a
    document.

    Args:
        tokenizer: The model's.
        requests: What to encode.
        max_length: Tokens that may be read at once.

    Returns:
        One piece per request; more if a continuation is longer than `max_length`, which then share no scored token.

    Raises:
        ConfigurationError: If a continuation has no token of its own.
    """
    moved = [at_the_border(request) for request in requests]
    contexts = _tokens(tokenizer, {request.context for request in moved if request.context})
    wholes = _tokens(tokenizer, {request.context + request.continuation for request in moved if request.context})
    alone = _tokens(tokenizer, {request.continuation for request in moved if not request.context}, special=False)
    pieces: list[Piece] = []
    for index, request in enumerate(moved):
        if request.context:
            context, border = contexts[request.context], len(contexts[request.context])
            # Where a token reaches across the border, the context keeps its own.
            whole = [*context, *wholes[request.context + request.continuation][border:]]
        else:
            whole, border = [_beginning(tokenizer), *alone[request.continuation]], 1
            if whole[1:2] == whole[:1]:
                whole = whole[1:]
        if len(whole) <= border:
            raise ConfigurationError(
                f"The continuation of request {index} has no token of its own.",
                "It is empty, or one with its context. Leave it out, or begin it with a space.",
            )
        pieces.extend(_pieces(index, whole, border, max_length, prompted=bool(request.context)))
    return pieces


def _pieces(index: int, whole: list[int], border: int, max_length: int, *, prompted: bool) -> Iterable[Piece]:
    for start in range(border, len(whole), max_length):
        end = min(start + max_length, len(whole))
        inputs = np.array(whole[max(0, end - 1 - max_length) : end - 1], dtype=np.int64)
        prompt = len(inputs) + 1 - (end - start) if prompted else 0
        yield Piece(index, inputs, tuple(whole[start:end]), prompt)


def _tokens(tokenizer: PreTrainedTokenizerBase, texts: set[str], special: bool = True) -> dict[str, list[int]]:
    if not texts:
        return {}
    ordered = list(texts)
    ids = tokenizer(ordered, add_special_tokens=special, verbose=False, return_attention_mask=False)["input_ids"]
    return dict(zip(ordered, ids, strict=True))


def _beginning(tokenizer: PreTrainedTokenizerBase) -> int:
    token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if token is None:
        raise ConfigurationError(
            "The tokenizer has neither BOS nor EOS: nothing stands before a continuation without context.",
            "Set tokenizer.eos_token to the token that ended documents in training.",
        )
    return token
