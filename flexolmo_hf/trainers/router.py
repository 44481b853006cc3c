"""Tune the router of a merged model on proxy data, its experts frozen (arXiv 2507.07024)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME
from trl import SFTTrainer

from flexolmo_hf.composition.router_base import complete_base
from flexolmo_hf.errors import ConfigurationError, NoCheckpointError, NonFiniteLossError, NotFlexOlmoError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.router_base import RouterBase, read_router_base
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.trainers.freezing import project_biases
from flexolmo_hf.trainers.losses import TrainingTap, lm_z_squares, router_z_loss
from flexolmo_hf.trainers.mixin import load_to_train
from flexolmo_hf.trainers.proof import FrozenProof
from flexolmo_hf.trainers.resume import decisive_settings, last_complete_checkpoint, refuse_changes, write_run
from flexolmo_hf.trainers.router_config import RouterSFTConfig
from flexolmo_hf.trainers.router_data import checked_sources, in_turn
from flexolmo_hf.trainers.router_freezing import freeze_all_but_routers
from flexolmo_hf.trainers.router_progress import RouterProgress


class RouterSFTTrainer(SFTTrainer):
    """Differs from TRL's `SFTTrainer` in that only router rows and biases move, and in data that comes by expert.

    The rows as they were go into every checkpoint, with the experts whose proxies were used, so that
    `flexolmo_hf.rollback_router` can take the tuning back. What is frozen is hashed before and after.

    Args:
        model: A `FlexOlmoForCausalLM` with the public expert and others, or the path of one.
        args: The settings.
        train_dataset: Data by expert: public data under ``"public"``, an owner's proxies, which are public documents
            that look like theirs, under the expert's name. Each expert gets the same number of sequences.
        **kwargs: As `SFTTrainer`.

    Raises:
        ConfigurationError: If `args` is no `RouterSFTConfig`, the data is not usable, or the model has no router to
            tune.
        UnknownExpertError: If data is given under a name that is none of the model's experts.
        NotFlexOlmoError: If the model is of another architecture.
    """

    _tag_names = ["trl", "sft", "flexolmo"]

    def __init__(self, model: Any, args: RouterSFTConfig, train_dataset: Any = None, **kwargs: Any):
        if not isinstance(args, RouterSFTConfig):
            raise ConfigurationError(
                f"The settings are a {type(args).__name__}.", "The router is tuned with a RouterSFTConfig."
            )
        if isinstance(model, (str, Path)):
            model = load_to_train(model, args)
        if not isinstance(model, ExpertSets):
            raise NotFlexOlmoError(model.config.model_type)
        self._sources = checked_sources(train_dataset, model.expert_names)
        self._base = complete_base(model)
        freeze_all_but_routers(model, train_public_row=args.train_public_row)
        # TRL takes one data set; the others join when it prepares it.
        self._mixed = False
        super().__init__(model, args=args, train_dataset=self._sources[PUBLIC], **kwargs)
        self._tap = TrainingTap(self.model)
        self._proof = FrozenProof(self.model)
        self._progress = RouterProgress(self.model)
        self.add_callback(_Tuning(self))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: Any, formatting_func: Any, dataset_name: str
    ) -> Any:
        prepare, options = super()._prepare_dataset, (processing_class, args, packing, formatting_func, dataset_name)
        # The training data comes first; what comes later is evaluated on, whatever the caller calls it.
        if self._mixed:
            return prepare(dataset, *options)
        self._mixed = True
        # Each by itself, so that no packed sequence holds texts of two sources.
        return in_turn({name: prepare(source, *options) for name, source in self._sources.items()})

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, or go on where a run was interrupted.

        Args:
            resume_from_checkpoint: True for the last checkpoint in ``args.output_dir`` that was saved to its end, or
                the folder of one.
            **kwargs: As the host's.

        Raises:
            NoCheckpointError: If there is none.
            ResumeMismatchError: If model, experts with proxies or settings are not those of the run.
            NonFiniteLossError: If the loss becomes NaN or infinite.
            FrozenMovedError: If something frozen has moved.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            refuse_changes(resume_from_checkpoint, self._decisive_settings())
            # What the run started from, whatever rows this model came with.
            found = read_router_base(resume_from_checkpoint)
            self._base = self._base if found is None else replace(found, steps=self._base.steps)
        result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        self.model.router_base = self._base_now()
        self._proof.check(self.model)
        if self.args.should_save and Path(self.args.output_dir).is_dir():
            self._proof.write(self.args.output_dir, self.model, self.state.global_step)
        return result

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Take the host's step, and stop before the optimizer does if the loss is not finite."""
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            try:
                kept = last_complete_checkpoint(self.args.output_dir).name
            except NoCheckpointError:
                kept = None
            step = self.state.global_step + 1
            raise NonFiniteLossError(step, step * self.args.gradient_accumulation_steps, kept)
        return loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Add both z-losses to the host's loss while training; evaluation reports the plain loss."""
        if not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        with self._tap.listening() as heard:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        self._progress.count(inputs["input_ids"].numel(), heard.router_logits)
        loss = loss + self._router_z_term(heard, inputs, num_items_in_batch)
        loss = loss + self._lm_z_term(heard, inputs, num_items_in_batch)
        heard.release()
        return (loss, outputs) if return_outputs else loss

    def _router_z_term(self, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        if not self.args.router_z_loss_coef:
            return 0.0
        z_loss = router_z_loss(heard.router_logits, inputs.get("attention_mask"))
        self._metrics["train"]["router_z_loss"].append(z_loss.item())
        # A mean of this micro-batch: with `num_items_in_batch` the trainer leaves the averaging over steps to the loss.
        steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
        return self.args.router_z_loss_coef * z_loss / steps

    def _lm_z_term(self, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        if not self.args.lm_z_loss_coef:
            return 0.0
        labels = inputs["labels"][:, 1:]
        squares = lm_z_squares(heard.hidden_BTH[:, :-1], self.model.lm_head, labels, heard.log_probs_BT)
        tokens = (labels != -100).sum()
        self._metrics["train"]["lm_z_loss"].append((squares.sum() / tokens.clamp(min=1)).item())
        # Normalised and scaled like the loss it joins.
        counted = torch.as_tensor(tokens if num_items_in_batch is None else num_items_in_batch)
        z_loss = squares.sum() / counted.clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            z_loss = z_loss * (self.accelerator.num_processes // self.get_tp_size())
        return self.args.lm_z_loss_coef * z_loss

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Log the host's figures and, with a training loss, the router's."""
        super().log({**logs, **self._progress.figures()} if "loss" in logs else logs, *args, **kwargs)

    def training_record(self) -> dict[str, Any]:
        """Return how the router was tuned, as numbers and choices: nothing of the data, no path."""
        args = self.args
        return {
            "method": type(self).__name__,
            "steps": self.state.global_step,
            "sequences per step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "sequence length": args.max_length,
            "packing": args.packing,
            "learning rate": args.learning_rate,
            "schedule": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
            "weight decay": args.weight_decay,
            "router z-loss": args.router_z_loss_coef,
            "output z-loss": args.lm_z_loss_coef,
            "public row trained": args.train_public_row,
            "seed": args.seed,
        }

    def _base_now(self) -> RouterBase:
        used = {*self._base.proxies, *(name for name in self._sources if name != PUBLIC)}
        return replace(
            self._base,
            proxies=sorted(used),
            steps=self._base.steps + self.state.global_step,
            tokens=self._base.tokens + int(self._total_train_tokens),
            training=self.training_record(),
        )

    def _decisive_settings(self) -> dict[str, Any]:
        chosen = {"train_public_row": self.args.train_public_row, "proxies": list(self._sources)}
        return {**decisive_settings(self.args, self._proof.fingerprint), **chosen}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.model.router_base is not None and self.state.global_step:
            self.model.router_base = self._base_now()
        super()._save(output_dir, state_dict)
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        # A pickle that nothing reads back, with every path of the run in it.
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        write_run(folder, self._decisive_settings())
        self._proof.write(folder, self.model, self.state.global_step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: TRL's names the run's folder and data set."""

    def _send_telemetry(self) -> None:
        if self.args.telemetry:
            super()._send_telemetry()


class _Tuning(TrainerCallback):
    """Hands the model its former router before the first step, and keeps biases at most 0 after each."""

    def __init__(self, trainer: RouterSFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.model.router_base = self.trainer._base_now()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        project_biases(kwargs["model"])
