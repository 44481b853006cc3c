"""How any model of a comparison is trained: one set of settings for experts, dense models and whole mixtures."""

import math
import os
from dataclasses import dataclass
from typing import Any

from flexolmo_hf.errors import ConfigurationError


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training run; rate, sequence and losses are the paper's unless said (arXiv 2507.07024).

    Models that are compared are trained with the same settings, whatever their trainer. The length of the run is given
    as `tokens`, as `steps`, or as passes over the text.

    Args:
        rate: Peak learning rate.
        sequence: Tokens per sequence. Documents lie in a row, each ended by the end token, cut to full sequences.
        batch: Sequences per step on each device, before accumulation.
        accumulation: Batches per optimizer step.
        tokens: How many tokens to train on, rounded up to whole steps.
        steps: How many optimizer steps.
        epochs: Passes over the text, where neither `tokens` nor `steps` is given.
        warmup: Warm-up, in steps or (below 1) as a share of the run.
        weight_decay: AdamW's.
        router_z_loss: Weight of the router z-loss; without effect on a model that has no router.
        output_z_loss: Weight of the z-loss on the output distribution.
        seed: Of the order of the sequences.
        save_every: Steps between checkpoints, from which a run can be resumed; None saves none.
        on_cpu: Whether to stay on the CPU where there is an accelerator: the same numbers on every machine.

    Raises:
        ConfigurationError: If a value makes no sense, or both `tokens` and `steps` are given.
    """

    rate: float = 9e-4
    sequence: int = 4096
    batch: int = 8
    accumulation: int = 1
    tokens: int | None = None
    steps: int | None = None
    epochs: float = 1.0
    warmup: float = 0.03
    weight_decay: float = 0.0
    router_z_loss: float = 1e-3
    output_z_loss: float = 1e-5
    seed: int = 0
    save_every: int | None = None
    on_cpu: bool = False

    def __post_init__(self) -> None:
        """Check the values."""
        if self.tokens is not None and self.steps is not None:
            raise ConfigurationError(
                f"Both tokens={self.tokens} and steps={self.steps} say how long to train.", "Give one of them."
            )
        for name in ("rate", "sequence", "batch", "accumulation", "tokens", "steps", "epochs", "save_every"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} is {value}.", "It is above 0.")
        for name in ("warmup", "weight_decay", "router_z_loss", "output_z_loss"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigurationError(f"{name} is {getattr(self, name)}.", "It is 0 or more.")

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on one device."""
        return self.sequence * self.batch * self.accumulation

    @property
    def max_steps(self) -> int | None:
        """The length of the run in steps, rounded up; None where passes over the text decide."""
        return self.steps if self.tokens is None else math.ceil(self.tokens / self.tokens_per_step)

    def as_fields(self, output_dir: str | os.PathLike) -> dict[str, Any]:
        """Return the settings as fields of `ExpertSFTConfig`, `RouterSFTConfig` or `WholeModelSFTConfig`.

        Args:
            output_dir: The run's folder, for checkpoints.

        Returns:
            Plain values, fit for a YAML file.
        """
        length = {"num_train_epochs": self.epochs} if self.max_steps is None else {"max_steps": self.max_steps}
        saving: dict[str, Any] = {"save_strategy": "no"}
        if self.save_every is not None:
            saving = {"save_strategy": "steps", "save_steps": self.save_every, "save_total_limit": 2}
        return {
            "output_dir": str(output_dir),
            "learning_rate": self.rate,
            "max_length": self.sequence,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            **length,
            **saving,
            "packing": True,
            "packing_strategy": "wrapped",
            "lr_scheduler_type": "cosine",
            "warmup_steps": self.warmup,
            "adam_beta1": 0.9,
            "adam_beta2": 0.95,
            "weight_decay": self.weight_decay,
            "max_grad_norm": 1.0,
            "router_z_loss_coef": self.router_z_loss,
            "lm_z_loss_coef": self.output_z_loss,
            "use_cpu": self.on_cpu,
            "bf16": False,
            "activation_checkpointing": False,
            "dataloader_pin_memory": False,
            "logging_steps": 20,
            "report_to": "none",
            "seed": self.seed,
        }
