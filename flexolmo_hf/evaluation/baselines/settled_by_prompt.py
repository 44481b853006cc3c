"""Models that settle by the beginning of a text how the rest is computed, and how they are told where it ends."""

from collections.abc import Sequence
from typing import Any

import torch


class SettledByPrompt:
    """Differs from other models in that the beginning of a text settles how what follows is computed.

    Unless told otherwise, that is the first ``config.prefix`` tokens. Who scores answers knows where prompts end, and
    says it with `prompt_options`.
    """

    config: Any

    @property
    def prompt_argument(self) -> str | None:
        """Name of the argument of `forward` that takes the tokens of each row's prompt; None if nothing is settled."""
        raise NotImplementedError

    def prompt_options(self, tokens: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return what `forward` takes so that each row's whole prompt settles how its answer is computed.

        Args:
            tokens: How many tokens each row's prompt has; 0 for a text without one, for which the default holds.
        """
        if self.prompt_argument is None:
            return {}
        return {self.prompt_argument: torch.tensor([number or self.config.prefix for number in tokens])}
