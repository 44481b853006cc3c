"""Doing steps in the order of their needs, on all cores, and never twice."""

import multiprocessing
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.flexmix_mini.place import Place


@dataclass(frozen=True)
class Step:
    """One piece of work, which ends in one result.

    Attributes:
        name: Of its result; no two steps share one.
        work: What to do, called with the place and `arguments`.
        needs: Steps that have to be done before.
        arguments: Plain values.
    """

    name: str
    work: Callable[..., Any]
    needs: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


def run_steps(place: Place, steps: list[Step], *, workers: int | None = None) -> None:
    """Do all steps that have not been done. After an interruption, the same call goes on where it ended.

    Every worker is a process with one thread: two small models train faster side by side than one after the other.

    Args:
        place: The study's folder.
        steps: What to do; each has its needs among those before it.
        workers: Processes; None for as many as there are cores.

    Raises:
        RuntimeError: If a step fails, with its name; what was done stays.
    """
    waiting = [step for step in steps if not place.is_done(step.name)]
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Fresh processes: a fork would take over threads that hold locks.
    method = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=Console(stderr=True)) as progress,
        ProcessPoolExecutor(workers or os.cpu_count(), mp_context=method, initializer=_one_thread) as pool,
    ):
        bar = progress.add_task("", total=len(steps), completed=len(steps) - len(waiting))
        running: dict[Future, Step] = {}
        while waiting or running:
            ready = [step for step in waiting if all(place.is_done(need) for need in step.needs)]
            for step in ready[: (workers or os.cpu_count() or 1) - len(running)]:
                waiting.remove(step)
                running[pool.submit(_do, place, step)] = step
            progress.update(bar, description=", ".join(step.name for step in running.values()))
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                step = running.pop(future)
                try:
                    future.result()
                except Exception as error:
                    raise RuntimeError(f"The step {step.name!r} failed. The same call goes on from here.") from error
                progress.advance(bar)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _do(place: Place, step: Step) -> None:
    # What a step prints would tear the progress bar apart; it is kept beside the results.
    log = place.root / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    started = time.process_time()
    found = step.work(place, **step.arguments)
    place.finish(step.name, found, time.process_time() - started)
