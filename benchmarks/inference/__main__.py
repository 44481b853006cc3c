"""Measure everything and write the page, the figures and the plot."""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.inference import growth, memory, sets, speed
from benchmarks.inference.checkpoints import write_checkpoint
from benchmarks.inference.page import page
from benchmarks.inference.plot import draw
from benchmarks.inference.processes import ROOT, Worker
from benchmarks.inference.settings import QUICK, Settings
from benchmarks.inference.turns import say

RESULTS = ROOT / "docs" / "benchmarks"


def measure(settings: Settings, start: Callable[[str], Worker] = Worker) -> dict[str, Any]:
    """Run all parts one after the other; about twenty-five minutes in full.

    Args:
        settings: What to measure.
        start: Starts a worker for ``"ours"`` or ``"stock"``.
    """
    import torch
    import transformers

    modules = (torch, transformers)
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in modules),
    }
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder, tiny = scratch / "main", scratch / "tiny"
        say("writing the checkpoint")
        weights = write_checkpoint(folder, settings.main)
        write_checkpoint(tiny, QUICK.main)
        results["weights"] = weights.as_dict()
        results["memory"] = memory.measure(folder, tiny, min(5, settings.rounds))
        with start("ours") as ours, start("stock") as stock:
            results["speed"] = speed.measure(ours, stock, str(folder), settings, results["weights"])
            ours.ask("load", folder=str(folder), per_token=settings.main.experts)
            results["switch"] = sets.switch(ours)
            results["rows"] = sets.rows(ours, settings)
            results["bandwidth"] = sets.bandwidth(ours, settings)
            with start("ours") as subset:
                subset.ask("load", folder=str(folder), per_token=settings.main.experts, active=memory.SUBSET)
                results["parts"] = sets.parts(ours, subset, settings)
            results["growth"] = growth.measure(ours, stock, scratch, settings)
    return results


def write(results: dict[str, Any], folder: Path) -> None:
    """Write inference.md, inference.json and inference.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "inference.md").write_text(page(results), encoding="utf-8")
    (folder / "inference.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results, folder / "inference.png")


def main() -> None:
    """Read the arguments, measure, print the page and write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inference", description=__doc__)
    parser.add_argument("--rounds", type=int, help="timed runs per case")
    parser.add_argument(
        "--quick", action="store_true", help="tiny models, to see that it works; writes only where --output says"
    )
    parser.add_argument("--output", type=Path, help="the folder to write to; default: docs/benchmarks")
    arguments = parser.parse_args()
    settings = QUICK if arguments.quick else Settings()
    if arguments.rounds:
        settings = replace(settings, rounds=arguments.rounds)
    results = measure(settings)
    print(page(results))
    output = arguments.output or (None if arguments.quick else RESULTS)
    if output is not None:
        write(results, output)
        say("written")


if __name__ == "__main__":
    main()
