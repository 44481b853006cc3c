"""Train one expert by rewards, with the model itself as its reference."""

from typing import Any

import torch
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from flexolmo_hf.trainers.config import ExpertGRPOConfig
from flexolmo_hf.trainers.mixin import ExpertTrainerMixin
from flexolmo_hf.trainers.reference import Reference
from flexolmo_hf.trainers.rows import refuse_lacking


class ExpertGRPOTrainer(ExpertTrainerMixin, GRPOTrainer):
    """Differs from TRL's `GRPOTrainer` in which parameters move, and in its reference, which is no second model.

    Args:
        model: A `FlexOlmoForCausalLM` that holds the expert, or the path of one.
        reward_funcs: As `GRPOTrainer`.
        args: The settings, with the expert's name; ``reference`` says what the policy is held against if ``beta`` is
            not 0.
        **kwargs: As `GRPOTrainer`.

    Raises:
        ConfigurationError: If `args` is no `ExpertGRPOConfig`, the expert cannot be trained, or the data hold nothing
            to train on.
        NotFlexOlmoError: If the model is of another architecture.
        UnknownExpertError: If the model has no such expert.
    """

    settings_class = ExpertGRPOConfig
    _tag_names = ["trl", "grpo", "flexolmo"]

    def __init__(self, model: Any, reward_funcs: Any, args: ExpertGRPOConfig, **kwargs: Any):
        # An environment may make the prompts itself.
        kinds = [("prompt",)] if kwargs.get("environment_factory") is None else []
        for rows in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            refuse_lacking(rows, kinds)
        beta = getattr(args, "beta", 0.0)
        try:
            # With a weight, TRL would load the model a second time, as the stock class.
            args.beta = 0.0
            super().__init__(model, reward_funcs, args=args, **kwargs)
        finally:
            args.beta = beta
        self.beta = beta
        if beta:
            self.ref_model = Reference(self.model, args.expert, args.reference)
            add_fused_lm_head(
                self.ref_model, temperature=self.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32
            )

    def _token_mask(self, inputs: Any) -> torch.Tensor:
        return torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)

    def _token_count(self, inputs: Any) -> int:
        return int(inputs["prompt_ids"].numel() + inputs["completion_ids"].numel())

    def _decisive_settings(self) -> dict[str, Any]:
        return {**super()._decisive_settings(), **(self.ref_model.record() if self.beta else {})}

    def training_record(self) -> dict[str, Any]:
        """Return how the expert was trained, as numbers and choices: nothing of the data, no path."""
        reference = {"reference": self.ref_model.kind} if self.beta else {}
        return {**super().training_record(), "beta": self.beta, **reference}
