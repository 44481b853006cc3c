"""What turns a trainer of TRL into a trainer of one expert (arXiv 2507.07024)."""

from pathlib import Path
from typing import Any, ClassVar

import torch

from flexolmo_hf.composition.compress import to_low_rank
from flexolmo_hf.composition.fingerprint import fingerprint_of
from flexolmo_hf.composition.training_record import PostTraining, write_training_record
from flexolmo_hf.trainers.config import ExpertSettings
from flexolmo_hf.trainers.freezing import freeze_except
from flexolmo_hf.trainers.part import PartTrainerMixin
from flexolmo_hf.trainers.progress import ExpertProgress
from flexolmo_hf.trainers.router_rate import scale_router_rate


class ExpertTrainerMixin(PartTrainerMixin):
    """Stands before a trainer of TRL among the bases of a class, and lets one expert move and nothing else.

    Only the named expert's feed-forward networks, its router row and its bias are handed to the optimizer.

    Example:
        >>> class ExpertSFTTrainer(ExpertTrainerMixin, SFTTrainer):
        ...     settings_class = ExpertSFTConfig

    Attributes:
        settings_class: The kind of settings it takes: a subclass of `ExpertSettings` and of the trainer's own.
    """

    settings_class: ClassVar[type[ExpertSettings]]

    def _prepared(self, model: Any, args: Any) -> Any:
        model = super()._prepared(model, args)
        if args.lora_r:
            to_low_rank(model, args.expert, args.lora_r, seed=args.seed)
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

    def _new_progress(self) -> ExpertProgress:
        return ExpertProgress(self.model, self.args.expert)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Make the host's optimizer, with the router's own learning rate."""
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)  # type: ignore[misc]
        if is_new:
            scale_router_rate(optimizer, self.model, self.args.router_lr_scale)
        return optimizer

    def training_record(self) -> dict[str, Any]:
        """Return how the expert was trained, as numbers and choices: nothing of the data, no path."""
        args = self.args
        return {
            **super().training_record(),
            "router trained": args.train_router,
            "router learning rate scale": args.router_lr_scale,
            **({"low-rank form": args.lora_r} if args.lora_r else {}),
            **({"shared weights trained": ", ".join(args.unfreeze)} if args.unfreeze else {}),
        }

    def evaluation_record(self) -> dict[str, Any]:
        """Return measured results for the card; empty if there are none."""
        return {}

    def post_training(self) -> PostTraining | None:
        """Return which shared weights were trained and the anchor they started from; None if none were."""
        return None if self._anchor is None else PostTraining(list(self.args.unfreeze), self._anchor)

    def _write_records(self, folder: Path) -> None:
        write_training_record(
            folder,
            training=self.training_record(),
            evaluation=self.evaluation_record(),
            post_training=self.post_training(),
        )
