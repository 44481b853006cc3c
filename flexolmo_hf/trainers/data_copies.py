"""The copies of an owner's data that readers make: where they lie during a run, and how they go."""

import platform
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)

_PREFIX = ".data-"


@contextmanager
def folder_of_copies(output: Path, args: TrainingArguments) -> Iterator[Path]:
    """Hold a folder for copies of data, one for all processes of a machine, as long as the block runs.

    SIGTERM, which schedulers send, ends the block as an error does, so that the folder is removed. What runs that were
    killed outright left in `output` is removed before.

    Args:
        output: Where the folder is made; it exists.
        args: Settings that know the processes of the run.

    Yields:
        The folder. The first process of each machine makes it; to the others it exists once that one has read.
    """
    run: str = broadcast_object_list([secrets.token_hex(4)])[0]
    # Machines may have `output` in common or each a disk of its own; a folder each is right for both.
    folder = output / f"{_PREFIX}{run}-{platform.node()}"
    if args.local_process_index != 0:
        yield folder
        return
    _remove_left(output, run)
    lock = FileLock(folder / "lock")
    with _on_sigterm(_exit):
        try:
            folder.mkdir(mode=0o700)
            lock.acquire()
            yield folder
        finally:
            # Schedulers may send it twice, and the second must not interrupt the removal.
            with _on_sigterm(signal.SIG_IGN):
                lock.release()
                _remove(folder)


def _remove_left(output: Path, run: str) -> None:
    """Remove the folders of runs that live no more; those of this run's other machines are in use."""
    for folder in output.glob(f"{_PREFIX}*"):
        if folder.name.startswith(f"{_PREFIX}{run}-"):
            continue
        lock = FileLock(folder / "lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            logger.warning("%r belongs to another run with the same output folder, which still lives.", folder.name)
            continue
        lock.release()
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        logger.warning("%r holds copies of the data and cannot be removed. Remove it by hand.", folder.name)


@contextmanager
def _on_sigterm(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    # Python allows the main thread alone to set handlers.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        # None stands for a handler that was not set from Python, which cannot be put back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if former is None else former)


def _exit(number: int, frame: FrameType | None) -> None:
    # What a shell reports of a process that the signal has ended.
    raise SystemExit(128 + number)
