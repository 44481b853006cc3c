"""Measure everything and write the page, the figures and the plot."""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.inference.checkpoints import write_checkpoint
from benchmarks.inference.processes import ROOT, Worker
from benchmarks.inference.turns import say
from benchmarks.training import memory, packages, speed
from benchmarks.training.page import page
from benchmarks.training.plot import draw
from benchmarks.training.settings import SMOKE, Settings

RESULTS = ROOT / "docs" / "benchmarks"
WHO = ("stock", "stock, frozen", "ours", "trainer")


class TrainingWorker(Worker):
    """Differs from `Worker` in whose worker it runs."""

    package = "benchmarks.training"


def measure(settings: Settings, start: Callable[[str], Any] = TrainingWorker) -> dict[str, Any]:
    """Run all parts one after the other; about five minutes in full.

    Args:
        settings: What to measure.
        start: Starts a worker for one of `WHO`.
    """
    import torch
    import transformers
    import trl

    from benchmarks.training import operations

    versions = (torch, transformers, trl)
    tokens = settings.batch * settings.tokens
    results: dict[str, Any] = {
        "settings": asdict(settings),
        "threads": torch.get_num_threads(),
        "versions": ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in versions),
        "trained": trained_parameters(settings),
        "operations": {
            "planned": operations.planned(settings.main, tokens, settings.tokens),
            "products": operations.operations(operations.products(settings.main, tokens)),
        },
        "packages": packages.measure(settings),
    }
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {"main": settings.main, "tiny": SMOKE.main, "wide": settings.wide}
        for folder, shape in folders.items():
            write_checkpoint(scratch / folder, shape)
        step = {"folder": str(scratch / "main"), "batch": settings.batch, "length": settings.tokens}
        with ExitStack() as stack:
            workers = {who: stack.enter_context(start(who)) for who in WHO}
            speed.check_agreement({who: worker.ask("load", **step) for who, worker in workers.items()})
            results["operations"]["counted"] = workers["ours"].ask("counted")
            results["speed"] = speed.measure(workers, settings)
            results["state"] = {who: worker.ask("state_bytes") for who, worker in workers.items()}
            results["trainer"] = workers["trainer"].ask("close")
        steps = {**step, "steps": settings.memory_steps, "tiny": str(scratch / "tiny")}
        results["memory"] = memory.measure(settings.memory_rounds, results["speed"]["stock_best"], **steps)
        results["wide"] = memory.largest(**{**steps, "folder": str(scratch / "wide"), "steps": 2})
    return results


def trained_parameters(settings: Settings) -> int:
    """Return how many parameters an expert and its router rows have, from the shape alone."""
    shape = settings.main
    return shape.layers * (3 * shape.hidden * shape.inner + shape.hidden)


def write(results: dict[str, Any], folder: Path) -> None:
    """Write training.md, training.json and training.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.md").write_text(page(results), encoding="utf-8")
    (folder / "training.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results, folder / "training.png")


def main() -> None:
    """Read the arguments, measure, print the page and write the files."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--rounds", type=int, help="timed steps of each contestant")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny models, to see that it works; writes only where --output says"
    )
    parser.add_argument("--output", type=Path, help="the folder to write to; default: docs/benchmarks")
    arguments = parser.parse_args()
    settings = SMOKE if arguments.smoke else Settings()
    if arguments.rounds:
        settings = replace(settings, rounds=arguments.rounds)
    results = measure(settings)
    print(page(results))
    output = arguments.output or (None if arguments.smoke else RESULTS)
    if output is not None:
        write(results, output)
        say("written")


if __name__ == "__main__":
    main()
