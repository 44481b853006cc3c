"""One expert: the feed-forward network of a dense decoder layer."""

from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoMLP

from flexolmo_hf.modeling.adjacent import Adjacent
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.gated import gated

#: An expert's parameters in one layer, by the names they have in the model and in files.
MATRICES = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class FlexOlmoExpert(FlexOlmoMLP):
    """Differs from upstream's feed-forward network in its linear layers' speed on few rows, and in what training keeps.

    Args:
        config: The model's configuration.
        width: How many neurons it has; default the configuration's ``intermediate_size``.
    """

    def __init__(self, config: FlexOlmoConfig, width: int | None = None):
        # Upstream's constructor would make and fill plain linear layers first.
        nn.Module.__init__(self)
        self.config = config
        hidden, inner = config.hidden_size, config.intermediate_size if width is None else width
        self.hidden_size, self.intermediate_size = hidden, inner
        self.gate_proj = FewRowsLinear(hidden, inner, bias=False)
        self.up_proj = FewRowsLinear(hidden, inner, bias=False)
        self.down_proj = FewRowsLinear(inner, hidden, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]
        #: Gate and up as one matrix, where they lie side by side in memory; see `on_cpu`.
        self.joined: Adjacent | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network, ``(..., H)`` to ``(..., H)``."""
        output: torch.Tensor = self.down_proj(gated(self.act_fn, self.gate_proj(x), self.up_proj(x)))
        return output

    def _apply(self, fn: Any, recurse: bool = True) -> "FlexOlmoExpert":
        # What has moved is not kept for the sake of where it was.
        self.joined = None
        super()._apply(fn, recurse)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what would keep this expert's memory."""
        return {**self.__dict__, "joined": None}
