"""The mixture that stands where a dense decoder has its feed-forward network.

Shape letters: B batch, T tokens, H hidden, A active experts, K experts per token, N = B*T.
"""

import torch
from torch import nn
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoMLP

from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.router import FlexOlmoRouter


class FlexOlmoMixture(nn.Module):
    """Differs from upstream's sparse block in that every expert is an ordinary module under its checkpoint index.

    FlexOlmo's experts are few and huge, so one 3-D tensor for all of them buys little; separate `nn.Linear` weights
    are loaded without a copy, frozen and trained one by one, and left out without being read.

    Attributes:
        gate: The router over all experts in memory.
        experts: The experts in memory, keyed by checkpoint index ("0", "3").
        active: Positions of the active ones among those in memory, ascending; None for all.
    """

    def __init__(self, config: FlexOlmoConfig):
        super().__init__()
        self.gate = FlexOlmoRouter(config)
        self.experts = nn.ModuleDict({str(index): FlexOlmoMLP(config) for index in config.loaded_indices})
        self.experts_per_token = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.active: tuple[int, ...] | None = None

    def forward(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Mix the outputs of each token's experts.

        Args:
            hidden_BTH: The residual stream, ``(B, T, H)``.

        Returns:
            The mixture's output, ``(B, T, H)``.
        """
        _, probs_BTA = self.gate(hidden_BTH, self.active)
        experts = list(self.experts.values())
        if self.active is not None:
            experts = [experts[position] for position in self.active]
        if self.experts_per_token >= len(experts):
            return self._all_experts(hidden_BTH, probs_BTA.to(hidden_BTH.dtype), experts)
        return self._top_experts(hidden_BTH, probs_BTA, experts)

    @staticmethod
    def _all_experts(hidden_BTH: torch.Tensor, weights_BTA: torch.Tensor, experts: list[nn.Module]) -> torch.Tensor:
        # Every expert sees every token: no choice, hence no sort, no gather and no wait for the device. The input keeps
        # its batch dimension, which per-sample gradients need.
        mixed = experts[0](hidden_BTH) * weights_BTA[..., 0:1]
        for position, expert in enumerate(experts[1:], start=1):
            mixed = mixed + expert(hidden_BTH) * weights_BTA[..., position : position + 1]
        return mixed

    def _top_experts(self, hidden_BTH: torch.Tensor, probs_BTA: torch.Tensor, experts: list[nn.Module]) -> torch.Tensor:
        tokens_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
        weights_NK, chosen_NK = probs_BTA.reshape(-1, len(experts)).topk(self.experts_per_token, dim=-1)
        if self.norm_topk_prob:
            weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
        weights_NK = weights_NK.to(hidden_BTH.dtype)
        mixed_NH = torch.zeros_like(tokens_NH)
        for position, expert in enumerate(experts):
            token, slot = torch.where(chosen_NK == position)
            if token.numel() == 0:
                continue
            output = expert(tokens_NH[token]) * weights_NK[token, slot, None]
            mixed_NH.index_add_(0, token, output.to(mixed_NH.dtype))
        return mixed_NH.view_as(hidden_BTH)
