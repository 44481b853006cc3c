"""Train one expert on preferences, with the model itself as its reference."""

from typing import Any

from trl import DPOTrainer

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.config import ExpertDPOConfig
from flexolmo_hf.trainers.mixin import ExpertTrainerMixin
from flexolmo_hf.trainers.reference import Reference
from flexolmo_hf.trainers.rows import refuse_all_dropped, refuse_lacking


class ExpertDPOTrainer(ExpertTrainerMixin, DPOTrainer):
    """Differs from TRL's `DPOTrainer` in which parameters move, and in its reference, which is no second model.

    Args:
        model: A `FlexOlmoForCausalLM` that holds the expert, or the path of one.
        args: The settings, with the expert's name; ``reference`` says what the policy is held against.
        **kwargs: As `DPOTrainer`, but for ``ref_model``.

    Raises:
        ConfigurationError: If `args` is no `ExpertDPOConfig`, a reference model is given, the expert cannot be
            trained, or the data hold nothing to train on.
        NotFlexOlmoError: If the model is of another architecture.
        UnknownExpertError: If the model has no such expert.
    """

    settings_class = ExpertDPOConfig
    _tag_names = ["trl", "dpo", "flexolmo"]

    def __init__(self, model: Any, args: ExpertDPOConfig, **kwargs: Any):
        if kwargs.pop("ref_model", None) is not None:
            raise ConfigurationError(
                "A reference model was given, but the reference is the trained model with other experts in force.",
                'Leave ref_model out, and choose with ExpertDPOConfig(reference="anchor" or "start").',
            )
        for rows in (kwargs.get("train_dataset"), kwargs.get("eval_dataset")):
            refuse_lacking(rows, [("chosen", "rejected")])
        super().__init__(model, args=args, **kwargs)

    def _prepared(self, model: Any, args: Any) -> Any:
        model = super()._prepared(model, args)
        self._reference = Reference(model, args.expert, args.reference)
        return model

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        refuse_all_dropped(prepared, args.max_length)
        return prepared

    def _host_arguments(self) -> dict[str, Any]:
        return {"ref_model": self._reference}

    def _decisive_settings(self) -> dict[str, Any]:
        return {**super()._decisive_settings(), **self._reference.record()}

    def training_record(self) -> dict[str, Any]:
        """Return how the expert was trained, as numbers and choices: nothing of the data, no path."""
        return {**super().training_record(), "beta": self.args.beta, "reference": self._reference.kind}
