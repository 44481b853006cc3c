"""What the trainers on text share: which rows they read, and the loss they add."""

from typing import Any

from flexolmo_hf.trainers.part import OutputZLoss
from flexolmo_hf.trainers.rows import refuse_lacking, text_columns


class TextTrainerMixin(OutputZLoss):
    """Stands before `PartTrainerMixin` among the bases of a trainer that is given text."""

    def __init__(self, model: Any, *positional: Any, **kwargs: Any):
        self._makes_text = kwargs.get("formatting_func") is not None
        super().__init__(model, *positional, **kwargs)  # type: ignore[call-arg]

    def _refuse_lacking(self, args: Any, *data: Any) -> None:
        """Refuse data without text; what a ``formatting_func`` reads is its own affair."""
        for rows in data:
            refuse_lacking(rows, [] if self._makes_text else text_columns(args.dataset_text_field))
