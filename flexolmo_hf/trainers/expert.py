"""Train one expert alone, next to the frozen public model, on text (arXiv 2507.07024)."""

from typing import Any

import torch
from trl import SFTTrainer

from flexolmo_hf.trainers.config import ExpertSFTConfig
from flexolmo_hf.trainers.losses import TrainingTap, lm_z_squares
from flexolmo_hf.trainers.mixin import ExpertTrainerMixin
from flexolmo_hf.trainers.rows import refuse_too_short, refuse_unreadable


class ExpertSFTTrainer(ExpertTrainerMixin, SFTTrainer):
    """Differs from TRL's `SFTTrainer` in which parameters move, in two losses, and in what it writes down.

    Data, packing, evaluation, checkpoints and resuming are TRL's: ``text``, ``prompt`` and ``completion``, and
    ``messages`` rows all work.

    Args:
        model: A `FlexOlmoForCausalLM` that holds the expert, or the path of one.
        args: The settings, with the expert's name.
        **kwargs: As `SFTTrainer`.

    Raises:
        ConfigurationError: If `args` is no `ExpertSFTConfig`, the expert cannot be trained, or the data hold nothing to
            train on.
        NotFlexOlmoError: If the model is of another architecture.
        UnknownExpertError: If the model has no such expert.
    """

    settings_class = ExpertSFTConfig
    _tag_names = ["trl", "sft", "flexolmo"]

    def __init__(self, model: Any, args: ExpertSFTConfig, **kwargs: Any):
        self._given_rows = kwargs.get("train_dataset"), kwargs.get("eval_dataset")
        super().__init__(model, args=args, **kwargs)
        refuse_too_short(self.train_dataset)

    def _prepared(self, model: Any, args: Any) -> Any:
        model = super()._prepared(model, args)
        for rows in self._given_rows:
            refuse_unreadable(rows, args.dataset_text_field)
        return model

    def _added_losses(self, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
        return super()._added_losses(heard, inputs, num_items_in_batch) + self._lm_z_term(
            heard, inputs, num_items_in_batch
        )

    def _lm_z_term(self, heard: TrainingTap, inputs: Any, num_items_in_batch: Any) -> torch.Tensor | float:
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
        return {
            **super().training_record(),
            "tokens": int(self._total_train_tokens),
            "sequence length": self.args.max_length,
            "packing": self.args.packing,
            "output z-loss": self.args.lm_z_loss_coef,
        }

    def evaluation_record(self) -> dict[str, Any]:
        """Return the last measured held-out loss, in nats per token; empty if none was measured."""
        losses = [entry["eval_loss"] for entry in self.state.log_history if "eval_loss" in entry]
        return {"held-out loss (nats per token)": round(losses[-1], 4)} if losses else {}
