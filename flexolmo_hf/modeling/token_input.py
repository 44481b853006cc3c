"""Tokens as callers hold them: ids, what a tokenizer returns, or what `generate` returns.

Shape letters: B batch, T tokens, P tokens of the prompt.
"""

from collections.abc import Mapping
from typing import Any

import torch

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.arguments import refuse_unknown
from flexolmo_hf.modeling.configuration import FlexOlmoConfig

_READ = frozenset({"input_ids", "attention_mask"})


def read_tokens(
    given: Any, attention_mask: torch.Tensor | None, config: FlexOlmoConfig, generation_config: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids, and which of them are real.

    Args:
        given: Ids ``(B, T)`` or ``(T,)``, a mapping with ``input_ids``, or an output of `generate` with ``sequences``.
        attention_mask: 0 where there is padding, in the shape of the ids; for an output of `generate`, also of the
            prompts alone.
        config: The model's configuration.
        generation_config: The model's settings for generating: which token pads, and which ones end a text.

    Returns:
        Ids ``(B, T)``, int64, and ``(B, T)`` bool, False for padding; on the device of the ids.

    Raises:
        ConfigurationError: If something else is given, ids or mask have another shape or dtype, there are two masks, or
            a row has no token.
        UnknownArgumentError: If a mapping holds more than ids and a mask.
    """
    generated = isinstance(given, Mapping) and "sequences" in given
    if generated:
        given = given["sequences"]
    elif isinstance(given, Mapping):
        given, attention_mask = _of_mapping(given, attention_mask)
    ids_BT = _checked_ids(given, config.vocab_size)
    if attention_mask is not None:
        attention_mask = _checked_mask(attention_mask, ids_BT, generated).to(ids_BT.device)
    if generated:
        real_BT = _real_of_generated(ids_BT, attention_mask, generation_config)
    else:
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool) if attention_mask is None else attention_mask
    if not real_BT.any(dim=1).all():
        raise ConfigurationError("A row has no token: all of it is padding.", "Leave such rows out of the batch.")
    return ids_BT, real_BT


def _of_mapping(given: Mapping[str, Any], mask: torch.Tensor | None) -> tuple[Any, torch.Tensor | None]:
    refuse_unknown(given, _READ)
    if mask is not None and given.get("attention_mask") is not None:
        raise ConfigurationError("There are two attention masks.", "Give the mask with the ids or beside them.")
    return given.get("input_ids"), given.get("attention_mask") if mask is None else mask


def _checked_ids(ids: Any, vocab_size: int) -> torch.Tensor:
    rule = "Give token ids as an int64 or int32 tensor of shape (batch, tokens), with at least one row and one token."
    if not isinstance(ids, torch.Tensor):
        raise ConfigurationError(f"The token ids are of type {type(ids).__name__}.", rule)
    if ids.dtype not in (torch.int64, torch.int32):
        raise ConfigurationError(f"The token ids are of dtype {str(ids.dtype).removeprefix('torch.')}.", rule)
    if ids.dim() not in (1, 2) or not ids.numel():
        raise ConfigurationError(f"The token ids are of shape {tuple(ids.shape)}.", rule)
    if not ((ids >= 0) & (ids < vocab_size)).all():
        raise ConfigurationError(
            f"Some token ids are not from 0 to {vocab_size - 1}.", "Use the tokenizer that belongs to this model."
        )
    return ids.reshape(-1, ids.shape[-1]).long()


def _checked_mask(mask: Any, ids_BT: torch.Tensor, generated: bool) -> torch.Tensor:
    shape = tuple(ids_BT.shape)
    rule = f"Give 1 for tokens and 0 for padding, as integers or bool of shape {shape}" + (
        ", or that of the prompts." if generated else "."
    )
    if not isinstance(mask, torch.Tensor):
        raise ConfigurationError(f"The attention mask is of type {type(mask).__name__}.", rule)
    if mask.is_floating_point() or mask.is_complex():
        raise ConfigurationError(f"The attention mask is of dtype {str(mask.dtype).removeprefix('torch.')}.", rule)
    mask_BT = mask.reshape(1, -1) if mask.dim() == 1 else mask
    fits = mask_BT.shape == ids_BT.shape
    if generated and mask_BT.dim() == 2:
        fits = len(mask_BT) == len(ids_BT) and 0 < mask_BT.shape[1] <= shape[1]
    if not fits:
        raise ConfigurationError(f"The attention mask is of shape {tuple(mask.shape)}.", rule)
    return mask_BT != 0


def _real_of_generated(ids_BT: torch.Tensor, mask_BP: torch.Tensor | None, generation_config: Any) -> torch.Tensor:
    """Tell tokens from padding as `generate` does, which fills up the rows that end before others."""
    ends = generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    pad = generation_config.pad_token_id
    # Greedy search and sampling fill with the padding token, or else with the first end; beam search with either.
    fill = [*ends, *([] if pad is None else [pad])]
    run_BT = torch.isin(ids_BT, ids_BT.new_tensor(fill)).flip(1).cumprod(1).flip(1).bool()
    first_BT = run_BT.clone()
    first_BT[:, 1:] &= ~run_BT[:, :-1]
    # A run of fill that begins with an end begins with the end of the text itself.
    padding_BT = run_BT & ~(first_BT & torch.isin(ids_BT, ids_BT.new_tensor(ends)))
    if mask_BP is not None:
        prompt = mask_BP.shape[1]
        padding_BT[:, :prompt] = ~mask_BP
        # In every row, one token at least was generated.
        padding_BT[:, prompt : prompt + 1] = False
    elif pad is not None and pad not in ends:
        # Without a mask, `generate` takes each such token of a prompt for padding.
        padding_BT |= ids_BT == pad
    return ~padding_BT
