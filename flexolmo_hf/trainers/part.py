"""What every trainer here shares: it moves a part of a model, and nothing else (arXiv 2507.07024)."""

from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
import trl
from torch.distributed.tensor import DTensor
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from trl import BEMACallback

from flexolmo_hf.errors import ConfigurationError, NoCheckpointError, NonFiniteLossError, NotFlexOlmoError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.trainers.config import PartSettings
from flexolmo_hf.trainers.freezing import project_biases
from flexolmo_hf.trainers.fused_head import small_pieces
from flexolmo_hf.trainers.losses import TrainingTap, lm_z_squares, router_z_loss
from flexolmo_hf.trainers.progress import ExpertProgressBar
from flexolmo_hf.trainers.proof import FrozenProof, write_proof
from flexolmo_hf.trainers.resume import (
    decisive_settings,
    last_complete_checkpoint,
    recognise_rows,
    refuse_changes,
    write_run,
)


class PartTrainerMixin:
    """Stands before a trainer of TRL among the bases of a class; what moves is the subclass's choice.

    With every save, and at the end, the frozen tensors are hashed and compared with the start; ``frozen.json`` says so.
    A run can be resumed to the bit, and stops before a step whose loss or gradient is not finite.

    Attributes:
        settings_class: The kind of settings it takes: a subclass of `PartSettings` and of the trainer's own.
    """

    settings_class: ClassVar[type[PartSettings]]

    # The host trainer's.
    model: Any
    args: Any
    state: Any
    accelerator: Any
    optimizer: Any
    _metrics: Any

    def __init__(self, model: Any, *positional: Any, args: Any = None, **kwargs: Any):
        if kwargs.get("peft_config") is not None:
            raise ConfigurationError(
                "peft_config would put adapters into what is frozen, and into all experts.",
                "An expert of low rank is trained with lora_r in the settings.",
            )
        model = self._prepared(model, args)
        super().__init__(model, *positional, args=args, **kwargs, **self._host_arguments())  # type: ignore[call-arg]
        self._tap = TrainingTap(self.model)
        self._proof = FrozenProof(self.model)
        self._progress = self._new_progress()
        self._batches, self._started = 0, False
        self._run: dict[str, Any] | None = None
        self.add_callback(_KeepBiasesNegative())
        if self.pop_callback(ProgressCallback) is not None:  # type: ignore[attr-defined]
            self.add_callback(ExpertProgressBar())

    def _prepared(self, model: Any, args: Any) -> Any:
        """Check what was given and return the model; a subclass freezes it."""
        if not isinstance(args, self.settings_class):
            raise ConfigurationError(
                f"The settings are a {type(args).__name__}, which does not say what is trained.",
                f"Give settings of the kind {self.settings_class.__name__}.",
            )
        _refuse_without_accelerator(args)
        if isinstance(model, (str, Path)):
            model = load_to_train(model, args)
        if not isinstance(model, ExpertSets):
            raise NotFlexOlmoError(model.config.model_type)
        if getattr(model, "hf_quantizer", None) is not None:
            raise ConfigurationError(
                "The model is quantised, and quantised weights do not learn.",
                "Load it without a quantization_config to train it, and quantise what comes of it.",
            )
        return model

    def add_callback(self, callback: Any) -> None:
        """Add a callback as the host does.

        Raises:
            ConfigurationError: If it, or one that was given at construction, is TRL's `BEMACallback` while something is
                frozen: it lays the averages of the trained parameters over the first of all parameters.
        """
        super().add_callback(callback)  # type: ignore[misc]
        kinds = [type(each) for each in self.callback_handler.callbacks]  # type: ignore[attr-defined]
        if BEMACallback in kinds and not all(parameter.requires_grad for parameter in self.model.parameters()):
            raise ConfigurationError(
                "TRL's BEMACallback averages models of which every parameter is trained, and here most are frozen.",
                "Average with torch.optim.swa_utils.AveragedModel(model) and update_parameters(model) after each step.",
            )

    def _new_progress(self) -> Any:
        """Return what collects figures: with `count` and `figures`."""
        raise NotImplementedError

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
            NoCheckpointError: If there is none, or the given one was not saved to its end.
            ResumeMismatchError: If model, settings, data or the number of processes are not those of the run.
            NonFiniteLossError: If the loss or a gradient becomes NaN or infinite.
            FrozenMovedError: If something frozen has moved, or is not the run's in the checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        self._batches, self._run = 0, self._settings_and_data()
        if resume_from_checkpoint:
            self._batches = refuse_changes(resume_from_checkpoint, self._run)
            self._resume_from(resume_from_checkpoint)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]
        found = self._proof.check(self.model, together=True)
        if self.args.should_save and Path(self.args.output_dir).is_dir():
            write_proof(self.args.output_dir, found, self.state.global_step)
        return result

    def _resume_from(self, folder: str) -> None:
        """Take over from a checkpoint what the host does not."""

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        """Load as the host does, and refuse files in which what is frozen is not what it was at the start."""
        self._proof.follow_sharding(self.model)
        super()._load_from_checkpoint(*args, **kwargs)  # type: ignore[misc]
        self._proof.check(self.model, together=True)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take the host's step, and stop before the optimizer does if the loss is not finite."""
        if not self._started:
            self._proof.follow_sharding(self.model)
            self._started = True
        self._batches += 1
        with small_pieces(self.accelerator.device):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        if not torch.isfinite(loss):
            raise NonFiniteLossError(self.state.global_step + 1, self._batches, self._last_checkpoint())
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(*args, **kwargs)  # type: ignore[misc]
        # In float16 the gradient scaler leaves such steps out and goes on with a smaller scale.
        if norm is None or self.accelerator.scaler is not None:
            return norm
        whole = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        if not torch.isfinite(whole):
            raise NonFiniteLossError(self.state.global_step + 1, self._batches, self._last_checkpoint(), "gradient")
        return norm

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the host does."""
        with small_pieces(self.accelerator.device):
            return super().prediction_step(*args, **kwargs)  # type: ignore[misc]

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
        """Log the host's figures and, with a training loss, what is trained; every tracker that is on gets them."""
        if "loss" in logs:
            logs = {**logs, **self._progress.figures()}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _decisive_settings(self) -> dict[str, Any]:
        return decisive_settings(self.args, model=self._proof.fingerprint, trainer=type(self).__name__)

    def _settings_and_data(self) -> dict[str, Any]:
        return {**self._decisive_settings(), **recognise_rows(self.train_dataset)}  # type: ignore[attr-defined]

    def training_record(self) -> dict[str, Any]:
        """Return how the part was trained, as numbers and choices: nothing of the data, no path."""
        args = self.args
        return {
            "method": type(self).__name__,
            "steps": self.state.global_step,
            "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "betas": f"{args.adam_beta1}, {args.adam_beta2}",
            "weight decay": args.weight_decay,
            "gradient clipping": args.max_grad_norm,
            "router z-loss": args.router_z_loss_coef,
            "seed": args.seed,
            "weights": str(self.model.dtype).removeprefix("torch."),
            "software": ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (transformers, trl, torch)),
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save as the host does, once it is known that nothing frozen has moved, and write ``frozen.json`` beside it.

        Raises:
            FrozenMovedError: If something frozen has moved, in whatever process; nothing is saved then.
        """
        # Checkpoints are made in every process; otherwise one of several copies of the model may be saved alone.
        found = self._proof.check(self.model, together=_internal_call or self._proof.sharded)
        super().save_model(output_dir, _internal_call)  # type: ignore[misc]
        folder = Path(output_dir or self.args.output_dir)
        # Of a checkpoint in shards the host makes the folder later.
        if self.args.should_save and (_internal_call or folder.is_dir()):
            folder.mkdir(parents=True, exist_ok=True)
            write_run(folder, self._run or self._settings_and_data(), self._batches)
            write_proof(folder, found, self.state.global_step)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads back, with every path of the run in it.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        self._write_records(folder)

    def _write_records(self, folder: Path) -> None:
        """Write beside the weights what the subclass knows of the run."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's names the run's folder and data set. Packages and merged models have cards of their own."""

    def _send_telemetry(self) -> None:
        if self.args.telemetry:
            super()._send_telemetry()  # type: ignore[misc]


class OutputZLoss:
    """Adds the z-loss on the output distribution, for trainers of next tokens."""

    def _added_losses(self, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        added = super()._added_losses(heard, inputs, num_items_in_batch)  # type: ignore[misc]
        total: torch.Tensor | float = added + self._lm_z_term(heard, inputs, num_items_in_batch)
        return total

    def _lm_z_term(self: Any, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        if not self.args.lm_z_loss_coef:
            return 0.0
        if heard.log_probs_BT is None:
            raise ConfigurationError(
                "The loss is computed from whole logits, without the labels' log-probabilities that the output z-loss "
                "is computed from.",
                "Set lm_z_loss_coef=0, or leave compute_loss_func out.",
            )
        labels = inputs["labels"][:, 1:]
        squares = lm_z_squares(heard.hidden_BTH[:, :-1], self.model.lm_head, labels, heard.log_probs_BT)
        tokens = (labels != -100).sum()
        self._metrics["train"]["lm_z_loss"].append((squares.sum() / tokens.clamp(min=1)).item())
        # Normalised and scaled like the loss it joins.
        z_loss = squares.sum() / torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch).clamp(
            min=1
        )
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            z_loss = z_loss * (self.accelerator.num_processes // self.get_tp_size())
        return self.args.lm_z_loss_coef * z_loss


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


def _refuse_without_accelerator(args: Any) -> None:
    """Refuse what the host would ignore on a CPU, or fail at."""
    # A launcher sets the precision without the setting that is its own.
    wanted = {
        "fp16": ("bf16=True", args.mixed_precision == "fp16"),
        "activation_offloading": ("gradient_checkpointing=True", getattr(args, "activation_offloading", False)),
    }
    for name, (instead, on) in wanted.items():
        if on and args.device.type == "cpu":
            raise ConfigurationError(
                f"{name} is on, and this run is on a CPU, where it has no effect.",
                f"Leave it out, use {instead}, or train on an accelerator.",
            )


class _KeepBiasesNegative(TrainerCallback):
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        project_biases(kwargs["model"])
