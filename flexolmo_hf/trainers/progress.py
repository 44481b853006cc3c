"""What a long run shows: tokens per second, how much of the routing the expert has, and how far its row has moved.

Shape letters: B batch, T tokens, A active experts, H hidden.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import ProgressCallback

from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.trainers.sharded import whole

#: What the bar shows beside the step, by the names of the log: how each figure is called there, and its format.
_SHOWN = {
    "loss": ("loss", ".4g"),
    "tokens_per_second": ("tok/s", ".0f"),
    "routing_share": ("share", ".2f"),
    "router_bias": ("bias", ".2f"),
    "row_distance": ("row", ".2g"),
}
# Where all experts' rows move, the log has these once for each, with its name behind.
_BY_EXPERT = {"routing_share", "router_bias"}


class ExpertProgress:
    """Collects the figures of one expert between two log entries, without waiting for the device.

    Args:
        model: The model, frozen as it will be trained.
        expert: Which expert is trained.
    """

    def __init__(self, model: FlexOlmoForCausalLM, expert: str):
        self.model, self.expert = model, expert
        self.column = model.active_experts.index(expert)
        self.start_rows = self._rows()
        self._tokens, self._since = 0, time.perf_counter()
        self._shares: list[torch.Tensor] = []

    def count(self, tokens: int, router_logits: Sequence[torch.Tensor]) -> None:
        """Take in one forward pass: how many tokens, and the router logits ``(B*T, A)`` of each layer."""
        self._tokens += tokens
        with torch.no_grad():
            shares = [logits.float().softmax(dim=-1)[:, self.column].mean() for logits in router_logits]
            if shares:
                self._shares.append(torch.stack(shares).mean())

    def figures(self) -> dict[str, float]:
        """Return what was collected since the last call, and where row and bias are now.

        Returns:
            ``tokens_per_second`` of this process; ``routing_share``, the expert's share of the routing mass;
            ``router_bias``, its mean over layers; ``row_distance``, how far its rows are from their start, as a mean
            over layers of the Euclidean distance.
        """
        now = time.perf_counter()
        found: dict[str, float] = {}
        if self._tokens:
            found["tokens_per_second"] = round(self._tokens / (now - self._since), 1)
        if self._shares:
            found["routing_share"] = round(torch.stack(self._shares).mean().item(), 4)
        distances = [(row - start).norm() for row, start in zip(self._rows(), self.start_rows, strict=True)]
        found["row_distance"] = round(torch.stack(distances).mean().item(), 6)
        biases = self._biases()
        if biases:
            found["router_bias"] = round(torch.stack(biases).mean().item(), 6)
        self._tokens, self._since, self._shares = 0, now, []
        return found

    def _rows(self) -> list[torch.Tensor]:
        at = self.model.expert_position(self.expert)
        with torch.no_grad():
            return [whole(mixture.gate.rows()[0][at]).float().clone() for mixture in self.model.mixtures]

    def _biases(self) -> list[torch.Tensor]:
        at = self.model.expert_position(self.expert)
        with torch.no_grad():
            found = [mixture.gate.rows()[1] for mixture in self.model.mixtures]
        return [whole(bias[at]).float() for bias in found if bias is not None]


class ExpertProgressBar(ProgressCallback):
    """Differs from the host's bar in what stands beside it: the newest figures instead of lines between the bars."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Show the newest figures."""
        if state.is_world_process_zero and self.training_bar is not None and logs:
            shown = {short: _written(logs, name, form) for name, (short, form) in _SHOWN.items()}
            if any(shown.values()):
                self.training_bar.set_postfix_str(", ".join(f"{short} {text}" for short, text in shown.items() if text))


def _written(logs: dict[str, Any], name: str, form: str) -> str:
    """Return the figure of that name; of one that each expert has, all of them in the model's order."""
    found = [logs[name]] if name in logs else []
    if name in _BY_EXPERT:
        found += [value for key, value in logs.items() if key.startswith(f"{name}_")]
    return "/".join(format(value, form) for value in found)
