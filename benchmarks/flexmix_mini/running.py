"""Doing steps in the order of their needs, on all cores, and never twice; those that cannot be done are skipped."""

import multiprocessing
import os
import threading
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
        writes: Files and folders that only this step writes, below the study's folder. What an interruption left of
            them is removed before the work, which begins anew.
        lacks: What the work cannot do without and is not there, and how to get it, in a sentence; else empty. Such a
            step is skipped, and so is all that needs it.
    """

    name: str
    work: Callable[..., Any]
    needs: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    writes: tuple[str, ...] = ()
    lacks: str = ""


def run_steps(place: Place, steps: list[Step], *, workers: int | None = None) -> None:
    """Do all steps that have not been done and lack nothing. After an interruption, the same call goes on.

    Every worker is a process with one thread: two small models train faster side by side than one after the other.

    Args:
        place: The study's folder.
        steps: What to do; each has its needs among those before it.
        workers: Processes; None for as many as there are cores.

    Raises:
        RuntimeError: If a step fails, with its name; what was done stays.
    """
    cannot = skipped(place, steps)
    waiting = [step for step in steps if not place.is_done(step.name) and step.name not in cannot]
    console = Console(stderr=True)
    for lacks in dict.fromkeys(cannot.values()):
        names = ", ".join(name for name, why in cannot.items() if why == lacks)
        # Brackets are those of pip's extras, not of markup, and a line to copy is not broken.
        console.print(f"Skipped: {names}. {lacks}", markup=False, highlight=False, soft_wrap=True)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    # Fresh processes: a fork would take over threads that hold locks.
    method = multiprocessing.get_context("spawn")
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers or os.cpu_count(), mp_context=method, initializer=_begin_worker) as pool,
    ):
        total = len(steps) - len(cannot)
        bar = progress.add_task("", total=total, completed=total - len(waiting))
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


def skipped(place: Place, steps: list[Step]) -> dict[str, str]:
    """Tell which steps are not done and cannot be, by name, and what they or those that they need lack."""
    found: dict[str, str] = {}
    for step in steps:
        lacks = step.lacks or next((found[need] for need in step.needs if need in found), "")
        if lacks and not place.is_done(step.name):
            found[step.name] = lacks
    return found


def _begin_worker() -> None:
    import torch

    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # The study's lock ends with the parent, however that ends: a worker that went on would write without it.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _do(place: Place, step: Step) -> None:
    # What a step prints would tear the progress bar apart; it is kept beside the results.
    log = place.root / "logs" / f"{step.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    place.clear(step.writes)
    started = time.process_time()
    found = step.work(place, **step.arguments)
    place.finish(step.name, found, time.process_time() - started)
