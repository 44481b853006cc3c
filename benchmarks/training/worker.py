"""A process that holds one contestant and takes one step when told to, so that several can take turns.

Requests and replies are lines of JSON, as in `benchmarks.inference.worker`.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch
import transformers

from benchmarks.inference.settings import Shape
from benchmarks.inference.worker import serve
from benchmarks.training import contestants, operations
from benchmarks.training.stepped import SteppedTrainer

#: What the main thread is to do, where another one answers the requests.
MAIN_THREAD: "queue.Queue[Callable[[], None] | None]" = queue.Queue()


def in_a_thread(task: Callable[[], None]) -> None:
    """Do something beside the main thread, where how fast it is does not matter."""
    threading.Thread(target=task, daemon=True).start()


def result_of(run: Callable[[Callable[[], None]], None], task: Callable[[], Any]) -> Any:
    """Have another thread do something, wait for it, and return or raise what comes of it."""
    done: Future[Any] = Future()

    def work() -> None:
        try:
            done.set_result(task())
        except BaseException as error:
            done.set_exception(error)

    run(work)
    return done.result()


class Bench:
    """One contestant: ``"stock"``, ``"stock, frozen"``, ``"ours"`` or ``"trainer"``."""

    def __init__(self, who: str, run: Callable[[Callable[[], None]], None] = in_a_thread):
        self.who = who
        self._run = run
        self.model: Any = None
        self.optimizer: Any = None
        self.ids_BT = torch.empty(0)
        self._stepped: SteppedTrainer | None = None
        self._products: operations.Products | None = None

    def load(self, folder: str, batch: int, length: int, **changes: Any) -> float:
        """Load the checkpoint, make ready, and return the loss before the first step.

        Args:
            folder: Where the checkpoint lies.
            batch: Sequences of a step.
            length: Tokens of each.
            **changes: Settings of the trainer that differ.
        """
        ready = partial(self._load, folder, batch, length)
        # Who waits for the trainer must not compute: see `SteppedTrainer`.
        loss: float = result_of(self._run, ready) if self.who == "trainer" else ready()
        if self.who == "trainer":
            self._stepped = SteppedTrainer(self.model, batch, length, self._run, **changes)
        return loss

    def _load(self, folder: str, batch: int, length: int) -> float:
        if self.who.startswith("stock"):
            self.model, self.optimizer = contestants.stock(folder, "eager", freeze=self.who == "stock, frozen")
        else:
            self.model, self.optimizer = contestants.ours(folder)
        self.ids_BT = contestants.tokens(batch, length, self.model.config.vocab_size)
        with torch.no_grad():
            return float(self.model(self.ids_BT, labels=self.ids_BT, use_cache=False).loss)

    def step(self, implementation: str = "auto") -> float:
        """Take one step and return its seconds."""
        if self._stepped is not None:
            return self._stepped.step()
        self.model.set_experts_implementation(implementation)
        begin = time.perf_counter()
        contestants.bare_step(self.model, self.optimizer, self.ids_BT)
        return time.perf_counter() - begin

    def loss(self) -> float:
        """Return the loss on the batch as it is now."""
        with torch.no_grad():
            return float(self.model(self.ids_BT, labels=self.ids_BT, use_cache=False).loss)

    def state_bytes(self) -> dict[str, int]:
        """Return the bytes of the optimizer's moments, and how many parameters it was given."""
        optimizer = self.optimizer if self._stepped is None else self._stepped.trainer.optimizer
        given = sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"])
        return {"moments": contestants.moment_bytes(optimizer), "parameters": given}

    def counted(self) -> float:
        """Return the operations that torch counts in a step."""
        return operations.counted(self.model, self.ids_BT)

    def products(self, **shape: int) -> float:
        """Return the seconds of a step's products alone."""
        if self._products is None:
            self._products = operations.Products(operations.products(Shape(**shape), self.ids_BT.numel()))
        return self._products.run()

    def close(self) -> dict[str, float]:
        """Let the trainer finish; return the seconds that it took to build it and to check what is frozen."""
        assert self._stepped is not None
        return {"built": self._stepped.built, "checked": self._stepped.close()}

    def end(self) -> None:
        """Let a trainer that still waits for its next step finish."""
        if self._stepped is not None and not self._stepped.has_ended:
            self._stepped.close()


def main(who: str) -> None:
    """Answer requests; a trainer needs the main thread for itself meanwhile."""
    transformers.utils.logging.disable_progress_bar()
    bench = Bench(who, run=MAIN_THREAD.put)
    if who != "trainer":
        serve(bench)  # type: ignore[arg-type]
        return

    def answer() -> None:
        try:
            serve(bench)  # type: ignore[arg-type]
        finally:
            bench.end()
            MAIN_THREAD.put(None)

    threading.Thread(target=answer, daemon=True).start()
    while (task := MAIN_THREAD.get()) is not None:
        task()


if __name__ == "__main__":
    main(sys.argv[1])
