"""Going on after a kill: the last checkpoint that was saved to its end, and the settings it was saved with."""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sized
from dataclasses import asdict, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from datasets import Dataset, Value
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from flexolmo_hf.errors import NoCheckpointError, ResumeMismatchError

RUN_FILE = "run.json"

# The optimizer's state: the host's file, and accelerate's of a sharded run, whole or in shards.
_OPTIMIZERS = (OPTIMIZER_NAME, "optimizer.bin", "optimizer_0")
# The folder of a sharded run's weights, if they are saved in shards.
_SHARDS = "pytorch_model_fsdp_0"

#: Settings that leave every step what it is; all others must be those the run was started with.
HARMLESS = {
    # Names and places.
    *("output_dir", "run_name", "project", "push_to_hub", "local_rank", "model_init_kwargs", "trust_remote_code"),
    *("chat_template_path", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
    *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port"),
    # What is shown.
    *("log_level", "log_level_replica", "log_on_each_node", "report_to", "disable_tqdm", "debug", "telemetry"),
    *("include_num_input_tokens_seen", "skip_memory_metrics", "num_completions_to_print"),
    *("log_completions", "log_completions_hub_repo", "log_multimodal", "log_unique_prompts"),
    # What is saved and evaluated.
    *("enable_jit_checkpoint", "load_best_model_at_end", "greater_is_better", "metric_for_best_model"),
    *("do_train", "do_eval", "do_predict", "per_device_eval_batch_size", "bf16_full_eval", "fp16_full_eval"),
    *("batch_eval_metrics", "include_for_metrics", "prediction_loss_only", "num_generations_eval"),
    # How fast it goes, and with how much memory.
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataset_num_proc", "recompute_frozen", "torch_empty_cache_steps"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "activation_offloading", "precompute_ref_batch_size"),
    *("ddp_timeout", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph"),
    *("ds3_gather_for_generation", "vllm_gpu_memory_utilization", "vllm_enable_sleep_mode"),
}
_HARMLESS_KINDS = ("logging_", "save_", "eval_", "hub_", "trackio_")
# Settings that decide what is frozen, and with it the fingerprint of that.
_FREEZING = {"trainer", "expert", "train_router", "lora_r", "unfreeze", "train_public_row", "trains"}
_BATCHES = "batches"

#: Of how many rows at most the training data are recognised.
SAMPLED_ROWS = 10_000


def decisive_settings(args: Any, *, model: str, trainer: str) -> dict[str, Any]:
    """Return what a run must keep when it is resumed, its data aside.

    Args:
        args: The settings, a dataclass.
        model: The fingerprint of what is frozen.
        trainer: The name of the trainer's class.
    """
    names = [field.name for field in fields(args) if field.name not in HARMLESS]
    found = {name: getattr(args, name) for name in names if not name.startswith(_HARMLESS_KINDS)}
    if isinstance(found.get("deepspeed"), str):
        # A path, which is nobody's business.
        del found["deepspeed"]
    return _plain({"trainer": trainer, **found, "processes": args.world_size, "model": model})


def recognise_rows(rows: Any) -> dict[str, Any]:
    """Return by what training data are known again: their number and one hash of rows spread evenly over them.

    Args:
        rows: A data set as it is trained on. Of one that is not `datasets.Dataset` only the number of rows is taken,
            and nothing of a stream.
    """
    if not isinstance(rows, Sized):
        return {"training rows": None}
    if not isinstance(rows, Dataset):
        return {"training rows": len(rows)}
    # Numbers that a trainer computed are left out: another machine computes others in the last bit.
    columns = [
        name
        for name, kind in sorted(rows.features.items())
        if not (isinstance(kind, Value) and kind.dtype.startswith("float"))
    ]
    plain, digest = rows.with_format(None), hashlib.sha256()
    chosen = range(0, len(rows), max(1, math.ceil(len(rows) / SAMPLED_ROWS)))
    for start in range(0, len(chosen), 500):
        batch = plain[chosen[start : start + 500]]
        digest.update(json.dumps([[name, _plain(batch[name])] for name in columns]).encode())
    return {"training rows": len(rows), "training data": digest.hexdigest()}


def write_run(folder: str | os.PathLike, settings: Mapping[str, Any], batches: int) -> None:
    """Write the settings into a checkpoint, and how many batches the run has taken."""
    content = {**settings, _BATCHES: batches}
    (Path(folder) / RUN_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def refuse_changes(folder: str | os.PathLike, now: Mapping[str, Any]) -> int:
    """Compare the settings of a complete checkpoint with those of now.

    Returns:
        How many batches the run had taken.

    Raises:
        NoCheckpointError: If the folder is no checkpoint that was saved to its end.
        ResumeMismatchError: Naming what differs, then and now.
    """
    folder = Path(folder)
    if not is_complete(folder):
        raise NoCheckpointError(folder.parent.name, [folder.name] if folder.is_dir() else [])
    then = json.loads((folder / RUN_FILE).read_text("utf-8"))
    changes = {name: (then[name], value) for name, value in now.items() if name in then and then[name] != value}
    if changes.keys() & _FREEZING:
        # The consequence, not the change.
        changes.pop("model", None)
    if changes:
        raise ResumeMismatchError([(name, _short(was), _short(value)) for name, (was, value) in changes.items()])
    return int(then[_BATCHES])


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
        json.loads((checkpoint / RUN_FILE).read_text("utf-8"))[_BATCHES]
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text("utf-8"))
        index = checkpoint / SAFE_WEIGHTS_INDEX_NAME
        weights = {SAFE_WEIGHTS_NAME}
        if index.is_file():
            weights = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        elif (checkpoint / _SHARDS).is_dir():
            weights = {_SHARDS}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    resumable = any((checkpoint / name).exists() for name in _OPTIMIZERS) and any(checkpoint.glob("rng_state*.pth"))
    return resumable and all((checkpoint / name).exists() for name in (*weights, SCHEDULER_NAME))


def _step_of(path: Path) -> str:
    return path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")


def _plain(value: Any) -> Any:
    """Return a value as it comes back from a JSON file; of what has no such form, the name of its kind."""
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return type(value).__name__


def _short(value: Any) -> Any:
    return value[:12] if isinstance(value, str) and len(value) == 64 else value
