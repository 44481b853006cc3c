"""Train one expert alone, next to the frozen public model, on text (arXiv 2507.07024)."""

from typing import Any

from trl import SFTTrainer

from flexolmo_hf.trainers.config import ExpertSFTConfig
from flexolmo_hf.trainers.mixin import ExpertTrainerMixin
from flexolmo_hf.trainers.rows import refuse_too_short
from flexolmo_hf.trainers.text import TextTrainerMixin


class ExpertSFTTrainer(TextTrainerMixin, ExpertTrainerMixin, SFTTrainer):
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
        self._refuse_lacking(args, *self._given_rows)
        return model

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
