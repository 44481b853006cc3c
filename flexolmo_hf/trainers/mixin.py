"""What turns a trainer of TRL into a trainer of one expert (arXiv 2507.07024)."""

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import trl
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from flexolmo_hf.composition.compress import to_low_rank
from flexolmo_hf.composition.fingerprint import fingerprint_of
from flexolmo_hf.composition.training_record import PostTraining, write_training_record
from flexolmo_hf.errors import ConfigurationError, NoCheckpointError, NonFiniteLossError, NotFlexOlmoError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.trainers.config import ExpertSettings
from flexolmo_hf.trainers.freezing import freeze_except, project_biases
from flexolmo_hf.trainers.losses import TrainingTap, router_z_loss
from flexolmo_hf.trainers.progress import ExpertProgress, ExpertProgressBar
from flexolmo_hf.trainers.proof import FrozenProof
from flexolmo_hf.trainers.resume import decisive_settings, last_complete_checkpoint, refuse_changes, write_run
from flexolmo_hf.trainers.router_rate import scale_router_rate


class ExpertTrainerMixin:
    """Stands before a trainer of TRL among the bases of a class, and lets one expert move and nothing else.

    Only the named expert's feed-forward networks, its router row and its bias are handed to the optimizer. With every
    save, and at the end, the frozen tensors are hashed and compared with the start; ``frozen.json`` says so.

    Example:
        >>> class ExpertSFTTrainer(ExpertTrainerMixin, SFTTrainer):
        ...     settings_class = ExpertSFTConfig

    Attributes:
        settings_class: The kind of settings it takes: a subclass of `ExpertSettings` and of the trainer's own.
    """

    settings_class: ClassVar[type[ExpertSettings]]

    # The host trainer's.
    model: Any
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    _metrics: Any

    def __init__(self, model: Any, *positional: Any, args: Any = None, **kwargs: Any):
        model = self._prepared(model, args)
        super().__init__(model, *positional, args=args, **kwargs, **self._host_arguments())  # type: ignore[call-arg]
        self._tap = TrainingTap(self.model)
        self._proof = FrozenProof(self.model)
        self._progress = ExpertProgress(self.model, args.expert)
        self._batches = 0
        self.add_callback(_KeepBiasesNegative())  # type: ignore[attr-defined]
        if self.pop_callback(ProgressCallback) is not None:  # type: ignore[attr-defined]
            self.add_callback(ExpertProgressBar())  # type: ignore[attr-defined]

    def _prepared(self, model: Any, args: Any) -> Any:
        if not isinstance(args, self.settings_class):
            raise ConfigurationError(
                f"The settings are a {type(args).__name__}, which names no expert.",
                f"Give an {self.settings_class.__name__}.",
            )
        if isinstance(model, (str, Path)):
            model = load_to_train(model, args)
        if not isinstance(model, ExpertSets):
            raise NotFlexOlmoError(model.config.model_type)
        if args.lora_r:
            to_low_rank(model, args.expert, args.lora_r, seed=args.seed)  # type: ignore[arg-type, attr-defined]
        # Before anything moves: packages of a run that moves shared weights still say which anchor they started from.
        self._anchor = fingerprint_of(model) if args.unfreeze else None
        freeze_except(
            model,
            args.expert,
            train_router=args.train_router,
            unfreeze_shared=args.unfreeze,
            allow_training_anchor=args.allow_training_anchor,
        )
        for mixture in model.mixtures:
            mixture.recompute_frozen = args.recompute_frozen
        return model

    def _host_arguments(self) -> dict[str, Any]:
        """Return what the host trainer is given besides what the caller gave."""
        return {}

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, or go on where a run was interrupted.

        Args:
            resume_from_checkpoint: True for the last checkpoint in ``args.output_dir`` that was saved to its end, or
                the folder of one.
            **kwargs: As the host's.

        Raises:
            NoCheckpointError: If there is none.
            ResumeMismatchError: If model or settings are not those of the run.
            NonFiniteLossError: If the loss becomes NaN or infinite.
            FrozenMovedError: If something frozen has moved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            refuse_changes(resume_from_checkpoint, self._decisive_settings())
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]
        self._proof.check(self.model)
        if self.args.should_save and Path(self.args.output_dir).is_dir():
            self._proof.write(self.args.output_dir, self.model, self.state.global_step)
        return result

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the host's optimizer, with the router's own learning rate."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if is_new:
            scale_router_rate(optimizer, self.model, self.args.router_lr_scale)
        return optimizer

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take the host's step, and stop before the optimizer does if the loss is not finite."""
        if self._batches == 0:
            self._proof.follow_sharding(self.model)
        self._batches += 1
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self.state.global_step + 1, self._batches, self._last_checkpoint())
        return loss

    def _last_checkpoint(self) -> str | None:
        try:
            return last_complete_checkpoint(self.args.output_dir).name
        except NoCheckpointError:
            return None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the method's losses to the host's while training; evaluation reports the plain loss."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        with self._tap.listening() as heard:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)  # type: ignore[misc]
        loss, outputs = result if return_outputs else (result, None)
        self._progress.count(self._token_count(inputs), heard.router_logits)
        loss = loss + self._added_losses(heard, inputs, num_items_in_batch)
        heard.release()
        return (loss, outputs) if return_outputs else loss

    def _added_losses(self, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        if not self.args.router_z_loss_coef:
            return 0.0
        z_loss = router_z_loss(heard.router_logits, self._token_mask(inputs)) * self._share_of_tokens(inputs)
        self._metrics["train"]["router_z_loss"].append(z_loss.item())
        # A mean of this micro-batch: with `num_items_in_batch` the trainer leaves the averaging over steps to the loss.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1  # type: ignore[attr-defined]
        return self.args.router_z_loss_coef * z_loss / steps

    def _share_of_tokens(self, inputs: Any) -> torch.Tensor | float:
        """Weigh this process's mean so that the processes' average is the mean over all their tokens."""
        if self.accelerator.num_processes == 1 or not self.args.average_tokens_across_devices:
            return 1.0
        mask = self._token_mask(inputs)
        kept = torch.tensor(self._token_count(inputs), device=self.accelerator.device) if mask is None else mask.sum()
        everyone = self.accelerator.reduce(kept.clone(), reduction="sum")
        return kept * self.accelerator.num_processes / everyone

    def _token_mask(self, inputs: Any) -> torch.Tensor | None:
        mask: torch.Tensor | None = inputs.get("attention_mask")
        return mask

    def _token_count(self, inputs: Any) -> int:
        return int(inputs["input_ids"].numel())

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log the host's figures and, with a training loss, the expert's; every tracker that is on gets them."""
        if "loss" in logs:
            logs = {**logs, **self._progress.figures()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _decisive_settings(self) -> dict[str, Any]:
        return decisive_settings(self.args, self._proof.fingerprint)

    def training_record(self) -> dict[str, Any]:
        """Return how the expert was trained, as numbers and choices: nothing of the data, no path."""
        args = self.args
        return {
            "method": type(self).__name__,
            "steps": self.state.global_step,
            "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning rate": args.learning_rate,
            "router learning rate scale": args.router_lr_scale,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "betas": f"{args.adam_beta1}, {args.adam_beta2}",
            "weight decay": args.weight_decay,
            "gradient clipping": args.max_grad_norm,
            "router z-loss": args.router_z_loss_coef,
            "router trained": args.train_router,
            **({"shared weights trained": ", ".join(args.unfreeze)} if args.unfreeze else {}),
            "seed": args.seed,
            "weights": str(self.model.dtype).removeprefix("torch."),
            "software": ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (transformers, trl, torch)),
        }

    def evaluation_record(self) -> dict[str, Any]:
        """Return measured results for the card; empty if there are none."""
        return {}

    def post_training(self) -> PostTraining | None:
        """Return which shared weights were trained and the anchor they started from; None if none were."""
        return None if self._anchor is None else PostTraining(list(self.args.unfreeze), self._anchor)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads back, with every path of the run in it.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        write_training_record(
            folder,
            training=self.training_record(),
            evaluation=self.evaluation_record(),
            post_training=self.post_training(),
        )
        write_run(folder, self._decisive_settings())
        self._proof.write(folder, self.model, self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's names the run's folder and data set. Packages and merged models have cards of their own."""

    def _send_telemetry(self) -> None:
        if self.args.telemetry:
            super()._send_telemetry()  # type: ignore[misc]


def load_to_train(path: str | Path, args: Any) -> FlexOlmoForCausalLM:
    """Load a model to train, in float32 unless ``model_init_kwargs`` say otherwise.

    TRL would look the architecture up by name in transformers and load the stock class.

    Raises:
        FlexOlmoError: The kind that fits, as `FlexOlmoForCausalLM.from_pretrained`.
    """
    options = {"dtype": "float32", **(args.model_init_kwargs or {})}
    # Used up here; TRL warns of options for a model that is already loaded.
    args.model_init_kwargs = None
    return FlexOlmoForCausalLM.from_pretrained(path, **options)


class _KeepBiasesNegative(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        project_biases(kwargs["model"])
