"""A stage: one child process whose progress is shown, and whose output goes to a log file and never to the terminal.

What a process says when it fails may quote the text it was reading. Only the log file has it.
"""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flexolmo_hf.errors import StageFailedError

# What tqdm writes, in transformers, TRL and datasets: "Tokenizing:  42%|████      | 42/100 [00:01<00:02, ...".
# It ends without a new line, so whatever is printed next follows on the same one.
_BAR = re.compile(
    r"\s*(?:(?P<what>[^%|]*?):\s*)?\d+%\|[^|]*\|\s*(?P<done>\d+)/(?P<total>\d+) \[[^]]*\](?P<rest>.*)", re.DOTALL
)


@dataclass(frozen=True)
class Stage:
    """One child process.

    Attributes:
        name: What the terminal and errors call it.
        module: Python module to run.
        arguments: Its command line.
        log: File for everything it prints.
        caches: Folder for its libraries' caches. They keep data sets as text, so no two owners may share one.
    """

    name: str
    module: str
    arguments: Sequence[str]
    log: Path
    caches: Path


class StageRunner:
    """Run stages, show their progress, and remember how long each took. Used in a ``with`` block."""

    def __init__(self, output_dir: Path):
        """Name log files relative to `output_dir`."""
        self.output_dir = output_dir
        self.seconds: dict[str, float] = {}
        columns = (
            TextColumn("{task.description:<24}"),
            BarColumn(),
            TextColumn("{task.fields[doing]}"),
            TimeElapsedColumn(),
        )
        # Progress goes where errors go, so that the result alone can be piped on.
        self._progress = Progress(*columns, console=Console(stderr=True))
        self._stop = threading.Event()

    def __enter__(self) -> "StageRunner":
        """Start showing progress."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop showing progress."""
        self._progress.stop()

    def run(self, *stages: Stage, threads: int | None = None) -> None:
        """Run stages one after the other.

        Args:
            *stages: In order.
            threads: Processor cores for each; None for all.

        Raises:
            StageFailedError: If one fails, naming the stage and its log file; the following ones do not start.
        """
        for stage in stages:
            self._run(stage, threads or os.cpu_count() or 1)

    def run_side_by_side(self, lines: Iterable[Sequence[Stage]]) -> None:
        """Run several sequences of stages at the same time, each on its share of the processor cores.

        Raises:
            StageFailedError: As `run`, for the first stage that fails; the other sequences are ended.
        """
        lines = list(lines)
        threads = max(1, (os.cpu_count() or 1) // len(lines))
        with ThreadPoolExecutor(len(lines)) as pool:
            try:
                running = [pool.submit(self.run, *stages, threads=threads) for stages in lines]
                ended = wait(running, return_when=FIRST_EXCEPTION).done
                for line in ended:
                    line.result()
            except BaseException:
                self._stop.set()
                raise

    @contextmanager
    def timed(self, name: str) -> Iterator[TaskID]:
        """Show and time a stage that this process does itself."""
        bar = self._progress.add_task(name, total=None, doing="")
        started = time.monotonic()
        try:
            yield bar
        except BaseException:
            self._progress.update(bar, doing="[red]failed")
            raise
        self._progress.update(bar, total=1, completed=1, doing="[green]done")
        self.seconds[name] = round(time.monotonic() - started, 1)

    def _run(self, stage: Stage, threads: int) -> None:
        stage.log.parent.mkdir(parents=True, exist_ok=True)
        with (
            self.timed(stage.name) as bar,
            stage.log.open("w", encoding="utf8") as log,
            _start(stage, threads) as process,
        ):
            try:
                self._follow(process, bar, log)
            except BaseException:
                process.terminate()
                raise
            if process.wait():
                raise StageFailedError(stage.name, stage.log.relative_to(self.output_dir).as_posix())

    def _follow(self, process: subprocess.Popen[str], bar: TaskID, log: TextIO) -> None:
        # Reading as text ends a line at a carriage return too, which is how a progress bar redraws itself.
        for line in process.stdout or ():
            if self._stop.is_set():
                process.terminate()
            if match := _BAR.match(line):
                done, total = int(match["done"]), int(match["total"])
                doing = f"{match['what'] or ''} {done}/{total}".strip()
                self._progress.update(bar, completed=done, total=total, doing=doing)
                line = match["rest"]
            if line.strip():
                log.write(line)


def _start(stage: Stage, threads: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", stage.module, *stage.arguments],
        env=os.environ | _environment(stage.caches, threads),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf8",
        errors="replace",
    )


def _environment(caches: Path, threads: int) -> dict[str, str]:
    return {
        "HF_HOME": str(caches),
        "HF_DATASETS_CACHE": str(caches / "datasets"),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait actively take the cores from whatever else runs: several times slower on a shared machine.
        "OMP_WAIT_POLICY": "PASSIVE",
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf8",
    }
