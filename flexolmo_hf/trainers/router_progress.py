"""What a tuning run shows: tokens per second, each expert's share of the routing and bias, and how far rows have moved.

Shape letters: B batch, T tokens, E experts, H hidden.
"""

import time
from collections.abc import Sequence

import torch

from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.trainers.sharded import whole


class RouterProgress:
    """Collects figures between two log entries, without waiting for the device.

    Args:
        model: The model, frozen as it will be trained.
    """

    def __init__(self, model: ExpertSets):
        self.model = model
        self.start_EH = self._rows()
        self._tokens, self._since = 0, time.perf_counter()
        self._shares_E: list[torch.Tensor] = []

    def count(self, tokens: int, router_logits: Sequence[torch.Tensor]) -> None:
        """Take in one forward pass: how many tokens, and the router logits ``(B*T, E)`` of each layer."""
        self._tokens += tokens
        with torch.no_grad():
            layers = [logits.float().softmax(dim=-1).mean(dim=0) for logits in router_logits]
            self._shares_E.append(torch.stack(layers).mean(dim=0))

    def figures(self) -> dict[str, float]:
        """Return what was collected since the last call, and where the rows are now.

        Returns:
            ``tokens_per_second`` of this process; ``routing_share_NAME`` of each expert; ``router_bias_NAME``, its
            mean over layers, if there are biases; ``row_distance``, how far the rows are from their start, a mean over
            experts and layers of the Euclidean distance.
        """
        now = time.perf_counter()
        found: dict[str, float] = {}
        if self._tokens:
            found["tokens_per_second"] = round(self._tokens / (now - self._since), 1)
        found |= self._named("routing_share", self._shares_E, digits=4)
        found |= self._named("router_bias", self._biases(), digits=6)
        pairs = zip(self._rows(), self.start_EH, strict=True)
        found["row_distance"] = round(
            torch.stack([(row - start).norm(dim=-1) for row, start in pairs]).mean().item(), 6
        )
        self._tokens, self._since, self._shares_E = 0, now, []
        return found

    def _named(self, what: str, values_E: list[torch.Tensor], *, digits: int) -> dict[str, float]:
        if not values_E:
            return {}
        means = torch.stack(values_E).mean(dim=0).tolist()
        return {
            f"{what}_{name}": round(mean, digits) for name, mean in zip(self.model.expert_names, means, strict=True)
        }

    def _biases(self) -> list[torch.Tensor]:
        with torch.no_grad():
            found = [mixture.gate.rows()[1] for mixture in self.model.mixtures]
        return [whole(bias).float() for bias in found if bias is not None]

    def _rows(self) -> list[torch.Tensor]:
        with torch.no_grad():
            return [mixture.gate.rows()[0].float().clone() for mixture in self.model.mixtures]
