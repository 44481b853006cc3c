"""Going on after a kill: the last checkpoint that was saved to its end, and the settings it was saved with."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from flexolmo_hf.errors import NoCheckpointError, ResumeMismatchError

RUN_FILE = "run.json"

# The optimizer's state: the host's file, and accelerate's of a sharded run, whole or in shards.
_OPTIMIZERS = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0")
# The folder of a sharded run's weights, if they are saved in shards.
_SHARDS = "pytorch_model_fsdp_0"

#: Settings that change what the next step would be. Others (logging, saving, evaluation) may differ.
DECISIVE = (
    "expert",
    "train_router",
    "lora_r",
    "router_z_loss_coef",
    "lm_z_loss_coef",
    "reference",
    "beta",
    "learning_rate",
    "router_lr_scale",
    "lr_scheduler_type",
    "warmup_steps",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
)


def decisive_settings(args: Any, model: str) -> dict[str, Any]:
    """Return what a run must keep when it is resumed.

    Args:
        args: The settings.
        model: The fingerprint of what is frozen.
    """
    found = {name: getattr(args, name) for name in DECISIVE if hasattr(args, name)}
    return {"model": model, **{name: _plain(value) for name, value in found.items()}}


def write_run(folder: str | os.PathLike, settings: Mapping[str, Any]) -> None:
    """Write the settings into a checkpoint."""
    (Path(folder) / RUN_FILE).write_text(json.dumps(dict(settings), indent=2) + "\n", encoding="utf-8")


def refuse_changes(folder: str | os.PathLike, now: Mapping[str, Any]) -> None:
    """Compare the settings of a checkpoint with those of now; a checkpoint without any has nothing to say.

    Raises:
        ResumeMismatchError: Naming what differs, then and now.
    """
    file = Path(folder) / RUN_FILE
    if not file.is_file():
        return
    then = json.loads(file.read_text("utf-8"))
    if changes := [(name, then[name], value) for name, value in now.items() if name in then and then[name] != value]:
        raise ResumeMismatchError([(name, _short(was), _short(value)) for name, was, value in changes])


def last_complete_checkpoint(folder: str | os.PathLike) -> Path:
    """Return the newest checkpoint of a run that was saved to its end.

    Raises:
        NoCheckpointError: If there is none.
    """
    found = sorted(
        (path for path in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if re.fullmatch(r"\d+", _step_of(path))),
        key=lambda path: int(_step_of(path)),
        reverse=True,
    )
    for path in found:
        if is_complete(path):
            return path
    raise NoCheckpointError(Path(folder).name, [path.name for path in found])


def is_complete(checkpoint: Path) -> bool:
    """Tell whether a checkpoint was saved to its end: its state, which is written last, can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
        index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
        weights = {SAFE_WEIGHTS_NAME}
        if index.is_file():
            weights = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        elif (checkpoint / _SHARDS).is_dir():
            weights = {_SHARDS}
    except (OSError, ValueError, KeyError):
        return False
    has_optimizer = any((checkpoint / name).exists() for name in _OPTIMIZERS)
    return has_optimizer and all((checkpoint / name).exists() for name in (*weights, SCHEDULER_NAME))


def _step_of(path: Path) -> str:
    return path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def _plain(value: Any) -> Any:
    return getattr(value, "value", value)


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
