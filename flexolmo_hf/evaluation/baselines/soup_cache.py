"""What a soup that weighs its members by the text remembers of each row: its tokens, its weights, its keys and values.

Shape letters: B batch, C tokens in the cache, T tokens of a call, M members.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache

from flexolmo_hf.errors import ConfigurationError


@dataclass(frozen=True)
class Context:
    """The tokens of a text so far.

    Attributes:
        ids_BC: The tokens.
        real_BC: Which of them are no padding.
        positions_BC: Where they stand.
    """

    ids_BC: torch.Tensor
    real_BC: torch.Tensor
    positions_BC: torch.Tensor

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Context":
        """Return it with each tensor changed."""
        return Context(change(self.ids_BC), change(self.real_BC), change(self.positions_BC))

    def part(self, rows: Any, columns: slice) -> dict[str, Any]:
        """Return what a model's forward takes for some rows and columns; the mask reaches back to the beginning."""
        return {
            "input_ids": self.ids_BC[rows, columns],
            "attention_mask": self.real_BC[rows, : columns.stop].long(),
            "position_ids": self.positions_BC[rows, columns],
        }

    def followed_by(self, later: "Context") -> "Context":
        """Return both, one after the other."""
        mine = (self.ids_BC, self.real_BC, self.positions_BC)
        others = (later.ids_BC, later.real_BC, later.positions_BC)
        return Context(*(torch.cat(both, dim=1) for both in zip(mine, others, strict=True)))


class SoupCache(Cache):
    """Differs from other caches in that each row has its own, filled by that row's average of the members.

    Until the weights of a row are settled it has none: what it has read is read again by the average.

    Attributes:
        context: The tokens read; None before the first.
        weights: The members' weights ``(M,)`` of each row, None where they are not settled.
        rows: The keys and values of each row, None as well.
        weight_tokens_B: How many tokens settle the weights of each row.
        averaged: The weights of an average and its parameters: the one built last, for the next call of a generation. A
            cache that is handed back for the first time, or by `generate`, holds none.
    """

    def __init__(self, members: Any = ()):
        self.context: Context | None = None
        self.weights: list[torch.Tensor | None] = []
        self.rows: list[Cache | None] = []
        self.weight_tokens_B: torch.Tensor | None = None
        self.averaged: tuple[torch.Tensor, dict[str, torch.Tensor]] | None = None
        self.offloading = False
        self.layer_class_to_replicate = None

    @property
    def is_empty(self) -> bool:
        """Tell whether no token has been read."""
        return self.context is None

    @property
    def layers(self) -> list[Any]:
        """All layers of all rows."""
        return [layer for cache in self.rows if cache is not None for layer in cache.layers]

    @property
    def is_compileable(self) -> bool:
        """Tell that it grows."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns have been read."""
        return 0 if self.context is None else self.context.ids_BC.shape[1]

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tell that there is no limit."""
        return -1

    def append(self, ids_BT: torch.Tensor, real_BT: torch.Tensor, position_ids: torch.Tensor | None) -> Context:
        """Add the tokens of a call and return all. Without positions each column is its own, as in any model."""
        start = self.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(start, start + ids_BT.shape[1], device=ids_BT.device).unsqueeze(0)
        later = Context(ids_BT, real_BT, position_ids.expand(ids_BT.shape))
        if self.context is None:
            self.weights, self.rows = [None] * len(ids_BT), [None] * len(ids_BT)
        self.context = later if self.context is None else self.context.followed_by(later)
        return self.context

    def activate_past_recording(self) -> None:
        """Do nothing: all tokens can be taken back as it is."""

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns; rows whose weights they settled are unsettled again.

        Args:
            tokens_to_remove: How many, as a negative number.

        Raises:
            ConfigurationError: If the number is positive or as many columns are not there.
        """
        if not -self.get_seq_length() <= tokens_to_remove <= 0:
            raise ConfigurationError(
                f"crop({tokens_to_remove}) cannot be done: {self.get_seq_length()} columns have been read.",
                "Say how many of them to take back, as a negative number.",
            )
        if self.context is None or not tokens_to_remove:
            return
        self.context = self.context.change(lambda tensor: tensor[:, :tokens_to_remove])
        assert self.weight_tokens_B is not None
        settled = (self.context.real_BC.sum(1) >= self.weight_tokens_B).tolist()
        for row, (still, cache) in enumerate(zip(settled, self.rows, strict=True)):
            if not still:
                self.weights[row] = self.rows[row] = None
            elif cache is not None:
                cache.crop(tokens_to_remove)

    def reset(self) -> None:
        """Forget all tokens."""
        self.__init__()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the rows of other beams in place."""
        self._choose(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._choose([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._choose(torch.arange(len(self.rows))[indices.cpu()].tolist())

    def _choose(self, rows: list[int]) -> None:
        if self.context is None:
            return
        self.context = self.context.change(lambda tensor: tensor[rows])
        self.weights = [self.weights[row] for row in rows]
        # Rows that were one go on apart.
        self.rows = [copy.deepcopy(self.rows[row]) for row in rows]
        if self.weight_tokens_B is not None:
            self.weight_tokens_B = self.weight_tokens_B[rows]
