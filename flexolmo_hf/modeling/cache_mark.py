"""A KV cache remembers whose experts filled it.

Keys and values of every layer but the first depend on the experts of the layers below, so a cache filled by one set and
continued with another mixes the two: an expert that is off would still speak through the cache. The mark follows the
rows of the cache through beam search and batch selection.
"""

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from flexolmo_hf.errors import CacheExpertSetError, ForeignCacheError
from flexolmo_hf.modeling.selection import RowNames

_MARK = "_flexolmo_mark"


@dataclass(frozen=True)
class CacheMark:
    """Who filled a cache.

    Attributes:
        model: The identity of the model.
        rows: One set of names for all rows, or one per row.
    """

    model: str
    rows: RowNames

    def fits(self, rows: RowNames) -> bool:
        """Tell whether rows of these sets may continue; one set stands for any number of equal rows."""
        mine, theirs = set(self.rows), set(rows)
        return mine == theirs if len(mine) == len(theirs) == 1 else self.rows == rows


def mark_cache(cache: Any, model: str, rows: RowNames) -> None:
    """Write down who fills a cache, and let the mark follow its rows."""
    _set(cache, CacheMark(model, rows))


def check_cache(cache: Any, model: str, rows: RowNames, shape: tuple[int, int, int]) -> None:
    """Let a cache be continued only by the model and the sets that filled it, and mark one that is still empty.

    Args:
        cache: A `transformers.Cache`.
        model: The identity of the model that would continue it.
        rows: The sets of this call.
        shape: The model's layers, key-value heads and width of a head.

    Raises:
        CacheExpertSetError: If another set filled it.
        ForeignCacheError: If another model did, or it is not known who did.
    """
    mark = getattr(cache, _MARK, None)
    if mark is not None and mark.model == model and mark.fits(rows):
        return
    if _is_empty(cache):
        mark_cache(cache, model, rows)
        return
    if mark is None or mark.model != model:
        raise ForeignCacheError(_shape_of(cache), shape, marked=mark is not None)
    raise CacheExpertSetError(mark.rows, rows)


def _is_empty(cache: Any) -> bool:
    if not getattr(cache, "is_initialized", True):
        return True
    # A static cache counts on its device: this may wait for it, once per cache.
    return int(cache.get_seq_length()) == 0


def _shape_of(cache: Any) -> tuple[int, int, int]:
    layers = getattr(cache, "layers", [])
    keys = getattr(layers[0], "keys", None) if layers else None
    return (
        (len(layers), keys.shape[1], keys.shape[3]) if isinstance(keys, torch.Tensor) and keys.dim() == 4 else (0, 0, 0)
    )


def _set(cache: Any, mark: CacheMark | None) -> None:
    setattr(cache, _MARK, mark)
    if "reset" not in vars(cache):
        # On this one cache only. Bound methods are copied with the object they are bound to.
        for method in (reset, reorder_cache, batch_select_indices, batch_repeat_interleave):
            setattr(cache, method.__name__, MethodType(method, cache))


def reset(cache: Any) -> None:
    """Empty the cache: whoever fills it next marks it."""
    setattr(cache, _MARK, None)
    type(cache).reset(cache)


def reorder_cache(cache: Any, beam_idx: torch.Tensor) -> None:
    """Reorder the rows and their marks."""
    _move_rows(cache, beam_idx)
    type(cache).reorder_cache(cache, beam_idx)


def batch_select_indices(cache: Any, indices: torch.Tensor) -> None:
    """Keep some rows and their marks."""
    _move_rows(cache, indices)
    type(cache).batch_select_indices(cache, indices)


def batch_repeat_interleave(cache: Any, repeats: int) -> None:
    """Repeat each row and its mark."""
    mark = getattr(cache, _MARK, None)
    if mark is not None and len(mark.rows) > 1:
        setattr(cache, _MARK, CacheMark(mark.model, tuple(row for row in mark.rows for _ in range(repeats))))
    type(cache).batch_repeat_interleave(cache, repeats)


def _move_rows(cache: Any, indices: torch.Tensor) -> None:
    mark = getattr(cache, _MARK, None)
    if mark is not None and len(set(mark.rows)) > 1:
        chosen = torch.arange(len(mark.rows))[indices.cpu()].tolist()
        setattr(cache, _MARK, CacheMark(mark.model, tuple(mark.rows[row] for row in chosen)))
