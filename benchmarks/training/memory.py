"""Peak memory of a few steps, and the largest tensor of a step, each in a process of its own."""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.inference.memory import resident, transformers_quiet
from benchmarks.inference.processes import command_and_place
from benchmarks.inference.turns import say

#: Everyone whose peak is measured: what they are, how stock runs its experts, and what the trainer is told.
CONTESTANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "stock": ("stock", {}),
    "stock, frozen": ("stock, frozen", {}),
    "ours": ("ours", {}),
    "trainer": ("trainer", {}),
    "trainer, as it comes": ("trainer", {"gradient_checkpointing": True}),
}


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns inside the block, backward passes included.

    Attributes:
        elements: How many elements it has.
        shape: Its shape.
    """

    elements = 0
    shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() > self.elements:
                self.elements, self.shape = leaf.numel(), tuple(leaf.shape)
        return result


def measure_here(request: dict[str, Any]) -> dict[str, Any]:
    """Take some steps in this process, after one of a tiny model that pays for imports.

    Args:
        request: ``who``, one of `CONTESTANTS`; ``implementation`` of stock's experts; ``folder`` of the checkpoint and
            ``tiny``, that of the tiny one; ``batch``, ``length``, ``steps``; ``watch``, whether to look for the largest
            tensor instead.

    Returns:
        ``growth``, the peak in bytes above the start, or ``elements`` and ``shape`` of the largest tensor.
    """
    transformers_quiet()
    if request["watch"]:
        return _largest(request)
    _take_steps({**request, "folder": request["tiny"], "length": 8, "steps": 1})
    before = resident("VmRSS")
    _take_steps(request)
    return {"growth": resident("VmHWM") - before}


def _take_steps(request: dict[str, Any]) -> None:
    from benchmarks.training.worker import Bench

    kind, changes = CONTESTANTS[request["who"]]
    bench = Bench(kind)
    bench.load(request["folder"], batch=request["batch"], length=request["length"], **changes)
    for _ in range(request["steps"]):
        bench.step(request["implementation"])
    if kind == "trainer":
        bench.close()


def _largest(request: dict[str, Any]) -> dict[str, Any]:
    from benchmarks.training.contestants import ours
    from benchmarks.training.stepped import make_trainer

    model, _ = ours(request["folder"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(model, request["batch"], request["length"], Path(folder), max_steps=request["steps"])
        with LargestTensor() as largest:
            trainer.train()
    return {"elements": largest.elements, "shape": list(largest.shape)}


def in_own_process(**request: Any) -> dict[str, Any]:
    """Let a process of its own take the steps; see `measure_here`."""
    place = command_and_place("memory", json.dumps({"watch": False, **request}), package="benchmarks.training")
    done = subprocess.run(**place, stdout=subprocess.PIPE, check=True)
    reply: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return reply


def measure(rounds: int, implementation: str, **request: Any) -> dict[str, Any]:
    """Return the medians of all contestants, which take turns."""
    runs: dict[str, list[int]] = {who: [] for who in CONTESTANTS}
    for number in range(rounds):
        for who, of in runs.items():
            way = implementation if who.startswith("stock") else "auto"
            of.append(in_own_process(who=who, implementation=way, **request)["growth"])
            say(f"peak, run {number + 1} of {rounds}, {who}: {of[-1] / 1e6:,.0f} MB")
    return {"medians": {who: statistics.median(of) for who, of in runs.items()}, "runs": runs}


def largest(**request: Any) -> dict[str, Any]:
    """Return the ``elements`` and the ``shape`` of the largest tensor in some steps of the trainer."""
    found = in_own_process(who="trainer", watch=True, **request)
    say(f"largest tensor of a step: {found['shape']}")
    return found


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))))
