"""TRL's fused head on a CPU: logits in pieces that memory which was just freed can hold again.

The head makes logits for up to 4,096 tokens at once. A graphics card's kernel folds each piece in place; on a CPU a
dozen operations follow one another, and each wants as much memory as the piece. Pieces of tens of megabytes are given
back to the system and mapped anew page by page every time, which takes longer than the operations do.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.kernels import chunked_logprob

#: Tokens whose logits are made at once on a CPU.
TOKENS_AT_ONCE = 128


@contextmanager
def small_pieces(device: torch.device) -> Iterator[None]:
    """Have TRL's fused head make logits for few tokens at once inside the block, forward and backward.

    Values and gradients stay what they are but for rounding.

    Args:
        device: Where the model is; anywhere but on a CPU nothing changes.
    """
    if device.type != "cpu":
        yield
        return
    before = chunked_logprob.TOKEN_CHUNK_SIZE
    chunked_logprob.TOKEN_CHUNK_SIZE = min(before, TOKENS_AT_ONCE)
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE = before
