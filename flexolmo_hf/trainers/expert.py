"""Train one expert alone, next to the frozen public model, with TRL (arXiv 2507.07024)."""

from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTTrainer

from flexolmo_hf.composition.training_record import write_training_record
from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.trainers.config import ExpertSFTConfig
from flexolmo_hf.trainers.freezing import freeze_except, project_biases
from flexolmo_hf.trainers.losses import TrainingTap, lm_z_squares, router_z_loss


class ExpertSFTTrainer(SFTTrainer):
    """Differs from TRL's `SFTTrainer` in which parameters move, in two losses, and in what it writes down.

    Only the named expert's feed-forward networks, its router row and its bias are handed to the optimizer. Data,
    packing, evaluation, checkpoints and resuming are TRL's: ``text``, ``prompt`` and ``completion``, and ``messages``
    rows all work.

    Args:
        model: A `FlexOlmoForCausalLM` that holds the expert, or the path of one.
        args: The settings, with the expert's name.
        **kwargs: As `SFTTrainer`.

    Raises:
        ConfigurationError: If `args` is no `ExpertSFTConfig`, or the expert cannot be trained.
        NotFlexOlmoError: If the model is of another architecture.
        UnknownExpertError: If the model has no such expert.
    """

    _tag_names = ["trl", "sft", "flexolmo"]

    def __init__(self, model: Any, args: ExpertSFTConfig, **kwargs: Any):
        if not isinstance(args, ExpertSFTConfig):
            raise ConfigurationError(
                f"The settings are a {type(args).__name__}, which names no expert.", "Give an ExpertSFTConfig."
            )
        if isinstance(model, (str, Path)):
            model = load_to_train(model, args)
        if not isinstance(model, ExpertSets):
            raise NotFlexOlmoError(model.config.model_type)
        freeze_except(model, args.expert, train_router=args.train_router)
        super().__init__(model=model, args=args, **kwargs)
        self._tap = TrainingTap(self.model)
        self.add_callback(_KeepBiasesNegative())

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add the z-losses to TRL's loss while training; evaluation reports the plain loss."""
        if not self.model.training or not (self.args.router_z_loss_coef or self.args.lm_z_loss_coef):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._tap.listening() as heard:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        loss = loss + self._router_z_term(heard, inputs, num_items_in_batch)
        loss = loss + self._lm_z_term(heard, inputs, num_items_in_batch)
        heard.release()
        return (loss, outputs) if return_outputs else loss

    def _router_z_term(
        self, heard: TrainingTap, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> torch.Tensor | float:
        if not self.args.router_z_loss_coef:
            return 0.0
        z_loss = router_z_loss(heard.router_logits, inputs.get("attention_mask"))
        self._metrics["train"]["router_z_loss"].append(z_loss.item())
        # A mean of this micro-batch: with `num_items_in_batch` the trainer leaves the averaging over steps to the loss.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return self.args.router_z_loss_coef * z_loss / steps

    def _lm_z_term(self, heard: TrainingTap, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor | float:
        if not self.args.lm_z_loss_coef:
            return 0.0
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

    def training_record(self) -> dict[str, Any]:
        """Return how the expert was trained, as numbers and choices: nothing of the data, no path."""
        args = self.args
        return {
            "steps": self.state.global_step,
            "tokens": int(self._total_train_tokens),
            "sequence length": args.max_length,
            "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "packing": args.packing,
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "betas": f"{args.adam_beta1}, {args.adam_beta2}",
            "weight decay": args.weight_decay,
            "gradient clipping": args.max_grad_norm,
            "router z-loss": args.router_z_loss_coef,
            "output z-loss": args.lm_z_loss_coef,
            "router trained": args.train_router,
            "seed": args.seed,
            "weights": str(self.model.dtype).removeprefix("torch."),
            "software": ", ".join(f"{m.__name__} {m.__version__.split('+')[0]}" for m in (transformers, trl, torch)),
        }

    def evaluation_record(self) -> dict[str, Any]:
        """Return the last measured held-out loss, in nats per token; empty if none was measured."""
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return {"held-out loss (nats per token)": round(losses[-1], 4)} if losses else {}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads back, with every path of the run in it.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        write_training_record(folder, training=self.training_record(), evaluation=self.evaluation_record())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's names the run's folder and data set. Packages and merged models have cards of their own."""

    def _send_telemetry(self) -> None:
        if self.args.telemetry:
            super()._send_telemetry()


def load_to_train(path: str | Path, args: ExpertSFTConfig) -> FlexOlmoForCausalLM:
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
