"""Which tokens of a text a chat model is asked about. Shape letters: B batch, T tokens."""

import torch

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.members import one_per_row


def query_lengths(value: int | torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
    """Return how many tokens of each row are its query, ``(B,)``.

    Args:
        value: One number, or ``(B,)``.
        input_ids: ``(B, T)``.

    Raises:
        ConfigurationError: If it has another shape, or a query would be empty.
    """
    limit_B = one_per_row("query_tokens", value, input_ids)
    if (limit_B < 1).any():
        raise ConfigurationError("query_tokens is below 1 for a row.", "A query has at least one token.")
    return limit_B


def real_tokens(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Return which tokens are no padding, bool ``(B, T)``.

    Args:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``; None if all are real. There are no cached tokens that it could cover.

    Raises:
        ConfigurationError: If the mask has another shape.
    """
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise ConfigurationError(
            f"attention_mask has shape {tuple(attention_mask.shape)} for tokens of shape {tuple(input_ids.shape)}.",
            "Give one value per token and row.",
        )
    return attention_mask.bool()
