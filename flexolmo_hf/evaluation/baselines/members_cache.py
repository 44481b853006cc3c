"""A cache of several models that read the same tokens, with how well each of them predicted these.

Shape letters: B batch, K last columns of the call that can still be taken back, M members, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from flexolmo_hf.errors import ConfigurationError

# Columns of a call that a cache which records can take back: assisted decoding drafts fewer.
_TAKEN_BACK = 64


@dataclass(frozen=True)
class Seen:
    """What is known after each of the last columns.

    Attributes:
        count_BK: Real tokens read.
        log_likelihood_BKM: What each member gave those that count for the weights, nats.
        next_BKMV: Log-probabilities of the token to come after the last real one.
    """

    count_BK: torch.Tensor
    log_likelihood_BKM: torch.Tensor
    next_BKMV: torch.Tensor

    def rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Seen":
        """Return it with the rows of the batch changed."""
        return Seen(change(self.count_BK), change(self.log_likelihood_BKM), change(self.next_BKMV))

    def without(self, columns: int) -> "Seen":
        """Return it without the last columns."""
        end = self.count_BK.shape[1] - columns
        return self.rows(lambda tensor: tensor[:, :end])


class MembersCache(Cache):
    """Differs from other caches in that it holds one for each member, and what settles the members' weights.

    A member that is known to weigh nothing is not run, and its cache stays behind.

    Attributes:
        caches: One for each member; None if nothing is kept.
        seen: What is known of the tokens read; None before the first.
        weight_tokens_B: How many tokens settle the weights of each row; None if all do.
    """

    def __init__(self, members: Iterable[Any], *, keep: bool = True):
        # Not upstream's: its layers are an attribute, and here they are those of the members' caches.
        self.caches: Sequence[Cache | None] = [DynamicCache(config=m.config) if keep else None for m in members]
        self.seen: Seen | None = None
        self.weight_tokens_B: torch.Tensor | None = None
        self.recording = False
        self.offloading = False
        self.layer_class_to_replicate = None

    @property
    def layers(self) -> list[Any]:
        """All layers of all members."""
        return [layer for cache in self._kept() for layer in cache.layers]

    @property
    def keeps(self) -> bool:
        """Tell whether keys and values are kept."""
        return any(True for _ in self._kept())

    @property
    def is_empty(self) -> bool:
        """Tell whether no token has been read."""
        return self.seen is None

    @property
    def columns_to_remember(self) -> int:
        """How many of the last columns of a call can be taken back, and one."""
        return _TAKEN_BACK + 1 if self.recording else 1

    @property
    def is_compileable(self) -> bool:
        """Tell that it grows."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many columns the members that are still run have read."""
        return max((cache.get_seq_length(layer_idx) for cache in self._kept()), default=0)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Tell that there is no limit."""
        return -1

    def activate_past_recording(self) -> None:
        """Remember, from now on, enough of each call to take back what assisted decoding drafts."""
        self.recording = True
        for cache in self._kept():
            cache.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns of the latest call.

        Args:
            tokens_to_remove: How many, as a negative number.

        Raises:
            ConfigurationError: If more is asked for than was remembered.
        """
        columns = -tokens_to_remove
        known = 0 if self.seen is None else self.seen.count_BK.shape[1] - 1
        if columns and not 0 < columns <= known:
            raise ConfigurationError(
                f"crop({tokens_to_remove}) cannot be done: {known} of the last tokens can be taken back.",
                "Only drafts of assisted decoding are remembered so. Start with an empty cache.",
            )
        if columns:
            assert self.seen is not None
            length = self.get_seq_length()
            for cache in self._kept():
                cache.crop(-max(0, columns - (length - cache.get_seq_length())))
            self.seen = self.seen.without(columns)

    def reset(self) -> None:
        """Forget all tokens."""
        for cache in self._kept():
            cache.reset()
        self.seen = self.weight_tokens_B = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Put the rows of other beams in place."""
        for cache in self._kept():
            cache.reorder_cache(beam_idx)
        self._change_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        for cache in self._kept():
            cache.batch_repeat_interleave(repeats)
        self._change_rows(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        for cache in self._kept():
            cache.batch_select_indices(indices)
        self._change_rows(lambda tensor: tensor[indices])

    def _kept(self) -> list[Cache]:
        return [cache for cache in self.caches if cache is not None]

    def _change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.seen is not None:
            self.seen = self.seen.rows(change)
        if self.weight_tokens_B is not None:
            self.weight_tokens_B = change(self.weight_tokens_B)
