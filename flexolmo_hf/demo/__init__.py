"""The demo: the whole idea on real text, with one call."""

from typing import Any

__all__ = ["DemoReport", "run_demo"]


def __getattr__(name: str) -> Any:
    # On first use: the modules of this folder also run as programs of their own and should start without the rest.
    if name in __all__:
        from flexolmo_hf.demo import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
