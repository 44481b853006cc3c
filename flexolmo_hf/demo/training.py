"""Training settings that the public model and the experts share, as fields of TRL's ``SFTConfig``."""

from pathlib import Path
from typing import Any

from flexolmo_hf.demo.settings import DemoSettings


def training_fields(output: Path, settings: DemoSettings, *, rate: float, epochs: float) -> dict[str, Any]:
    """Describe one training run.

    Args:
        output: Folder for the trained model.
        settings: Sequence length, batch and seed.
        rate: Peak learning rate.
        epochs: Passes over the text.

    Returns:
        Plain values, fit for a YAML file.
    """
    return {
        "output_dir": str(output),
        "learning_rate": rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": settings.batch,
        "max_length": settings.sequence,
        # Documents in a row, each ended by the end token, cut to full sequences: no padding, so every token trains.
        "packing": True,
        "packing_strategy": "wrapped",
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.05,
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        # The same numbers on every machine, and a job this small gains nothing from an accelerator.
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "dataloader_pin_memory": False,
        "logging_steps": 20,
        "save_strategy": "no",
        "report_to": "none",
        "seed": settings.seed,
    }
