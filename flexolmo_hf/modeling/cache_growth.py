"""A KV cache that has room to grow: upstream's copies all its keys and values for every token it adds.

On a CPU that copy, and the fresh memory for it, take longer than the attention itself: the longer the text, the more.

Shape letters: B batch, G key-value heads, C tokens in the cache, T new tokens, D width of a head.
"""

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

# Room for so many more tokens is made at once: at least, and as a part of those that are there.
_LEAST_ROOM = 64
_PART = 4


class GrowingLayer(DynamicLayer):
    """Differs from upstream's layer in where keys and values lie: at the start of a larger buffer, if they only grow.

    What was handed out is never written again. Whoever puts other tensors in place (beams, cropping, selection) gets
    upstream's way for the next update; so do gradient, compilers and devices other than a CPU.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        self._buffers: tuple[torch.Tensor, torch.Tensor] | None = None
        self._returned: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add keys and values ``(B, G, T, D)``, and return all, ``(B, G, C + T, D)``."""
        filled = self.get_seq_length()
        if not self._only_grows(filled, key_states):
            self._buffers = None
            super().update(key_states, value_states, *args, **kwargs)
        else:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            self.keys, self.values = self._grown(filled, key_states, value_states)
        self._returned = self.keys
        return self.keys, self.values

    def _grown(
        self, filled: int, key_states: torch.Tensor, value_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        added = key_states.shape[-2]
        needed = filled + added
        if not self._has_room(needed):
            self._make_room(filled, needed, key_states, value_states)
        keys, values = self._buffers  # type: ignore[misc]
        # Not by index: for one token that would take longer than the copies.
        keys.narrow(-2, filled, added).copy_(key_states)
        values.narrow(-2, filled, added).copy_(value_states)
        return keys.narrow(-2, 0, needed), values.narrow(-2, 0, needed)

    def reset(self) -> None:
        """Forget all, and let its memory go."""
        self._buffers = self._returned = None
        super().reset()

    def _only_grows(self, filled: int, key_states: torch.Tensor) -> bool:
        if key_states.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if filled == 0:
            return True
        return self.keys is self._returned and key_states.dtype == self.keys.dtype

    def _has_room(self, needed: int) -> bool:
        if self._buffers is None or self._buffers[0].shape[-2] < needed:
            return False
        # Memory from inference mode may only be written there.
        return torch.is_inference_mode_enabled() or not self._buffers[0].is_inference()

    def _make_room(self, filled: int, needed: int, *new_states: torch.Tensor) -> None:
        roomy = needed + max(_LEAST_ROOM, needed // _PART)
        buffers = []
        for kept, states in zip((self.keys, self.values), new_states, strict=True):
            buffer = states.new_empty((*states.shape[:-2], roomy, states.shape[-1]))
            if filled:
                buffer[..., :filled, :] = kept
            buffers.append(buffer)
        self._buffers = (buffers[0], buffers[1])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the buffer out of copies and pickles: two caches must not write into one."""
        return {**self.__dict__, "_buffers": None}


def let_grow(cache: Any) -> None:
    """Give a plain dynamic cache layers with room to grow; others stay as they are."""
    if type(cache) is not DynamicCache or cache.offloading:
        return
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            growing = GrowingLayer()
            growing.__dict__.update(vars(layer))
            growing._returned = layer.keys
            cache.layers[index] = growing
