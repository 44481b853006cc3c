"""Our trainer, held still before each of its steps, so that it can take turns with others."""

import queue
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks.training.contestants import EXPERT, RATE, tokens

#: More than any benchmark asks for, in steps: the run ends when it is told to.
ENDLESS = 100_000
#: Steps of an epoch. What a trainer does between epochs is no part of a step.
EPOCH = 200


class SteppedTrainer:
    """An `ExpertSFTTrainer` whose `train` waits before each step until another thread lets it go on.

    A step is timed from its release until the trainer is about to begin the next, so that fetching data, logging,
    clipping and schedules are in it. Everything is as the trainer has it by default but for what would change the work:
    gradient checkpointing is off, as in the bare loop.

    Args:
        model: The model to train.
        batch: Sequences of a step.
        length: Tokens of each.
        run: Has the main thread do something, and returns at once. Only that thread may compute: OpenMP gives each
            thread that does a team of its own, and with more threads than cores every team falls asleep between two
            operations instead of waiting awake.
        **changes: Settings that differ.
    """

    def __init__(self, model: Any, batch: int, length: int, run: Callable[[Callable[[], None]], None], **changes: Any):
        self._folder = tempfile.TemporaryDirectory()
        self._go: queue.Queue[bool] = queue.Queue()
        self._arrived: queue.Queue[BaseException | float] = queue.Queue()
        self._ended = threading.Event()
        self.trainer: Any = None
        #: Seconds to build it, which hashes all that is frozen.
        self.built = 0.0
        run(partial(self._train, model, batch, length, changes))
        self._wait()

    @property
    def has_ended(self) -> bool:
        """Whether the trainer has finished."""
        return self._ended.is_set()

    def step(self) -> float:
        """Let the trainer take one step, and return its seconds."""
        begin = time.perf_counter()
        self._go.put(True)
        return self._wait() - begin

    def close(self) -> float:
        """Take a last step, let the trainer finish, and return the seconds that checking what is frozen took."""
        self._go.put(False)
        self._ended.wait()
        self._folder.cleanup()
        begin = time.perf_counter()
        self.trainer._proof.check(self.trainer.model)
        return time.perf_counter() - begin

    def _train(self, model: Any, batch: int, length: int, changes: dict[str, Any]) -> None:
        try:
            begin = time.perf_counter()
            self.trainer = make_trainer(model, batch, length, Path(self._folder.name), **changes)
            self.built = time.perf_counter() - begin
            self.trainer.add_callback(_Gate(self._go, self._arrived))
            self.trainer.train()
        except BaseException as error:
            # The one who waits is told, in its own thread.
            self._arrived.put(error)
        finally:
            self._ended.set()

    def _wait(self) -> float:
        arrived = self._arrived.get()
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived


class _Gate(TrainerCallback):
    def __init__(self, go: "queue.Queue[bool]", arrived: "queue.Queue[BaseException | float]"):
        self._go, self._arrived = go, arrived
        self._goes_on = True

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._arrived.put(time.perf_counter())
        self._goes_on = self._go.get()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = not self._goes_on


def make_trainer(model: Any, batch: int, length: int, folder: Path, **changes: Any) -> Any:
    """Return an `ExpertSFTTrainer` on the batch that everyone trains on, over and over."""
    from datasets import Dataset

    import flexolmo_hf

    rows = tokens(batch, length, model.config.vocab_size).tolist() * EPOCH
    settings = {
        "expert": EXPERT,
        "output_dir": str(folder),
        "max_steps": ENDLESS,
        "per_device_train_batch_size": batch,
        "learning_rate": RATE,
        "warmup_steps": 0,
        "max_length": length,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return flexolmo_hf.ExpertSFTTrainer(
        model=model,
        args=flexolmo_hf.ExpertSFTConfig(**{**settings, **changes}),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=_tokenizer(),
    )


def _tokenizer() -> Any:
    # The rows are tokens already; the trainer wants to know the padding token.
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
