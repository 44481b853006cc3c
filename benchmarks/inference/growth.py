"""How speed follows the number of experts, the length of the prompt, and the width of the model."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.inference.checkpoints import write_checkpoint
from benchmarks.inference.processes import Worker
from benchmarks.inference.settings import Settings, Shape
from benchmarks.inference.speed import check_agreement, compare
from benchmarks.inference.turns import say


def models(settings: Settings) -> Iterator[tuple[Shape, list[tuple[str, int, int]]]]:
    """Yield each model with the points it gives: along which line, at which value, with how many prompt tokens."""
    points: dict[Shape, list[tuple[str, int, int]]] = {}
    for experts in settings.experts:
        points.setdefault(replace(settings.small, experts=experts), []).append(("experts", experts, settings.prefill))
    for tokens in settings.prompts:
        points.setdefault(settings.small, []).append(("prompt", tokens, tokens))
    for width in settings.widths:
        points.setdefault(settings.small.with_hidden(width), []).append(("hidden", width, settings.prefill))
    yield from points.items()


def measure(ours: Worker, stock: Worker, scratch: Path, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Compare prefill and decoding at every point; every token uses all experts.

    Returns:
        The points of each line. ``prefill`` is in seconds for ``tokens``, ``decode`` in seconds per token.
    """
    lines: dict[str, list[dict[str, Any]]] = {"experts": [], "prompt": [], "hidden": []}
    brief = replace(settings, rounds=min(3, settings.rounds), new_tokens=max(1, settings.new_tokens // 2))
    for shape, points in models(settings):
        say(f"growth: hidden {shape.hidden}, {shape.experts} experts")
        folder = scratch / "growth"
        weights = write_checkpoint(folder, shape)
        for worker in (ours, stock):
            worker.ask("load", folder=str(folder), per_token=shape.experts)
        check_agreement(ours, stock, settings.prompt)
        done: dict[int, dict[str, Any]] = {}
        for line, value, tokens in points:
            if tokens not in done:
                done[tokens] = _both(ours, stock, brief, shape, tokens)
            read = weights.read_by(shape.experts)
            lines[line].append({"value": value, "tokens": tokens, "bytes": read, **done[tokens]})
        shutil.rmtree(folder)
    return {line: sorted(points, key=lambda point: point["value"]) for line, points in lines.items()}


def _both(ours: Worker, stock: Worker, settings: Settings, shape: Shape, tokens: int) -> dict[str, Any]:
    prefill = {"do": "prefill", "tokens": tokens, "batch": 1}
    decode = {"do": "decode", "prompt": tokens, "batch": 1, "new_tokens": settings.new_tokens}
    return {
        "prefill": compare(ours, stock, settings, shape, per_token=shape.experts, **prefill),
        "decode": compare(ours, stock, settings, shape, per_token=shape.experts, **decode),
    }
