"""A KV cache remembers whose experts filled it.

Keys and values of every layer but the first depend on the experts of the layers below, so a cache filled by one set and
continued with another mixes the two: an expert that is off would still speak through the cache. The mark follows the
rows of the cache through beam search and batch selection.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from transformers.cache_utils import Cache

from flexolmo_hf.errors import CacheExpertSetError, ConfigurationError, ForeignCacheError
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
    """Write down who fills a cache, and let the mark follow its rows.

    Raises:
        ConfigurationError: If it is no cache of a decoder.
    """
    _refuse_other_kinds(cache)
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
        ConfigurationError: If it is no cache of a decoder.
    """
    mark = getattr(cache, _MARK, None)
    if mark is not None and not _follows_its_rows(cache):
        mark = None
    if mark is not None and mark.model == model and mark.fits(rows):
        return
    _refuse_other_kinds(cache)
    if _is_empty(cache):
        mark_cache(cache, model, rows)
        return
    if mark is None or mark.model != model:
        raise ForeignCacheError(_shape_of(cache), shape, marked=mark is not None)
    raise CacheExpertSetError(mark.rows, rows)


def _refuse_other_kinds(cache: Any) -> None:
    # One for encoders and decoders is a cache too, but has no layers of its own.
    if not isinstance(cache, Cache) or "layers" not in vars(cache):
        raise ConfigurationError(
            f"past_key_values is a {type(cache).__name__}, which is no cache of a decoder.",
            "Give a transformers.Cache such as DynamicCache() or StaticCache(...). One is made of the tensors of each "
            "layer by DynamicCache([(keys, values), ...]); model.mark_cache(cache, active_experts=[...]) then says who "
            "filled it.",
        )


def _is_empty(cache: Any) -> bool:
    # Every layer: a call that died on its way has filled the lower ones. A static cache counts on its device: this may
    # wait for it, once per cache.
    return all(not layer.is_initialized or int(layer.get_seq_length()) == 0 for layer in cache.layers)


def _shape_of(cache: Any) -> tuple[int, int, int]:
    layers = getattr(cache, "layers", [])
    keys = getattr(layers[0], "keys", None) if layers else None
    return (
        (len(layers), keys.shape[1], keys.shape[3]) if isinstance(keys, torch.Tensor) and keys.dim() == 4 else (0, 0, 0)
    )


class _FollowRows:
    """Stands in one cache in the place of a method that moves rows, and moves the mark with them.

    An object and not a bound method: pickles and deep copies of the cache get one of their own. It does not hold the
    cache, whose memory would then wait for the garbage collector.
    """

    def __init__(self, cache: Any, method: str):
        self._cache: Any = ref(cache)
        self.kind, self.layers, self.method = type(cache), cache.layers, method

    @property
    def cache(self) -> Any:
        """The cache whose method this is; None if there is none any more."""
        return self._cache()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = self.cache
        if cache is None:
            # A shallow copy has outlived the original, whose layers it has.
            cache = object.__new__(self.kind)
            cache.layers = self.layers
        mark = getattr(cache, _MARK, None)
        if mark is not None:
            argument = next(iter((*args, *kwargs.values())), None)
            setattr(cache, _MARK, _MOVED[self.method](mark, argument))
        return getattr(type(cache), self.method)(cache, *args, **kwargs)

    def __reduce__(self) -> Any:
        # While a cache is copied or pickled, it stands for its copy.
        return _follower, (self.cache, self.kind, self.layers, self.method)


def _follower(cache: Any, kind: type, layers: list[Any], method: str) -> _FollowRows:
    follower = _FollowRows.__new__(_FollowRows)
    follower._cache = _nothing if cache is None else ref(cache)
    follower.kind, follower.layers, follower.method = kind, layers, method
    return follower


def _nothing() -> None:
    """Stand for a reference to what is gone; unlike a lambda, it can be pickled."""


def _reordered(mark: CacheMark, indices: torch.Tensor) -> CacheMark:
    if len(set(mark.rows)) == 1:
        return CacheMark(mark.model, mark.rows[:1])
    chosen = torch.arange(len(mark.rows))[indices.cpu()].tolist()
    return CacheMark(mark.model, tuple(mark.rows[row] for row in chosen))


def _repeated(mark: CacheMark, repeats: int) -> CacheMark:
    return CacheMark(mark.model, tuple(row for row in mark.rows for _ in range(repeats)))


_MOVED: dict[str, Callable[[CacheMark, Any], CacheMark | None]] = {
    "reset": lambda mark, _: None,
    "reorder_cache": _reordered,
    "batch_select_indices": _reordered,
    "batch_repeat_interleave": _repeated,
}


def _set(cache: Any, mark: CacheMark) -> None:
    setattr(cache, _MARK, mark)
    for method in _MOVED:
        setattr(cache, method, _FollowRows(cache, method))


def _follows_its_rows(cache: Any) -> bool:
    # A shallow copy shares its layers with the original, and moves the original's mark.
    return getattr(vars(cache).get("reorder_cache"), "cache", None) is cache
