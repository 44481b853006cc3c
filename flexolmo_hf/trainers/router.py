"""Tune the router of a merged model on proxy data, its experts frozen (arXiv 2507.07024)."""

from dataclasses import replace
from typing import Any

from transformers import TrainerCallback
from trl import SFTTrainer

from flexolmo_hf.composition.router_base import complete_base
from flexolmo_hf.modeling.files.router_base import RouterBase, read_router_base
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.trainers.part import PartTrainerMixin
from flexolmo_hf.trainers.router_config import RouterSFTConfig
from flexolmo_hf.trainers.router_data import checked_sources, in_turn
from flexolmo_hf.trainers.router_freezing import freeze_all_but_routers
from flexolmo_hf.trainers.router_progress import RouterProgress
from flexolmo_hf.trainers.text import TextTrainerMixin


class RouterSFTTrainer(TextTrainerMixin, PartTrainerMixin, SFTTrainer):
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

    settings_class = RouterSFTConfig
    _tag_names = ["trl", "sft", "flexolmo"]

    def __init__(self, model: Any, args: RouterSFTConfig, train_dataset: Any = None, **kwargs: Any):
        self._given, self._evaluated = train_dataset, kwargs.get("eval_dataset")
        super().__init__(model, args=args, **kwargs)
        self.add_callback(_KeepBase(self))

    def _prepared(self, model: Any, args: Any) -> Any:
        model = super()._prepared(model, args)
        self._sources = checked_sources(self._given, model.expert_names)
        self._refuse_lacking(args, self._sources, self._evaluated)
        self._base, self._mixed = complete_base(model), False
        freeze_all_but_routers(model, train_public_row=args.train_public_row)
        return model

    def _host_arguments(self) -> dict[str, Any]:
        # TRL takes one data set; the others join when it prepares it.
        return {"train_dataset": self._sources[PUBLIC]}

    def _new_progress(self) -> RouterProgress:
        return RouterProgress(self.model)

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
        """Train, or go on where a run was interrupted; see `PartTrainerMixin.train`."""
        result = super().train(resume_from_checkpoint, **kwargs)
        self.model.router_base = self._base_now()
        return result

    def _resume_from(self, folder: str) -> None:
        # What the run started from, whatever rows this model came with.
        found = read_router_base(folder)
        self._base = self._base if found is None else replace(found, steps=self._base.steps)

    def training_record(self) -> dict[str, Any]:
        """Return how the router was tuned, as numbers and choices: nothing of the data, no path."""
        return {
            **super().training_record(),
            "sequence length": self.args.max_length,
            "packing": self.args.packing,
            "output z-loss": self.args.lm_z_loss_coef,
            "public row trained": self.args.train_public_row,
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
        return {**super()._decisive_settings(), **chosen}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.model.router_base is not None and self.state.global_step:
            self.model.router_base = self._base_now()
        super()._save(output_dir, state_dict)


class _KeepBase(TrainerCallback):
    """Hands the model its former router before the first step."""

    def __init__(self, trainer: RouterSFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.model.router_base = self.trainer._base_now()
