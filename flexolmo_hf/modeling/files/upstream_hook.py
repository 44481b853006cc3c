"""A function of upstream that can be replaced for the length of a block, in this thread only.

Upstream's loading and saving are long functions that do much of what is wanted here (sharded, offloaded and quantised
weights, uploads) and one thing that is not. Where they offer no place to say it, the function that does this one thing
is replaced while they run; other models and threads go on with the original.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import Any


class UpstreamHook:
    """Stands in a module in the place of one of its functions, and calls it unless a block says otherwise."""

    def __init__(self, module: ModuleType, name: str):
        """Take the place of ``module.name``.

        Raises:
            AttributeError: If this version of upstream has no such function.
        """
        self.original: Callable[..., Any] = getattr(module, name)
        self._replacement: ContextVar[Callable[..., Any] | None] = ContextVar(name, default=None)
        setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call what stands here now."""
        return (self._replacement.get() or self.original)(*args, **kwargs)

    @contextmanager
    def replaced(self, replacement: Callable[..., Any]) -> Iterator[None]:
        """Use another function inside the block; it may call `original`."""
        token = self._replacement.set(replacement)
        try:
            yield
        finally:
            self._replacement.reset(token)
