"""One decoder layer: upstream's attention, the mixture, and a norm after each.

Shape letters: B batch, T tokens, H hidden.
"""

from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling import one_token
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.kept_tokens import KeptTokens, works_by_token
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm
from flexolmo_hf.modeling.selection import Selection


class FlexOlmoAttention(upstream.FlexOlmoAttention):
    """Differs from upstream's attention in its linear layers' speed on few rows, and in its norms."""

    def __init__(self, config: FlexOlmoConfig, layer_idx: int | None = None):
        super().__init__(config, layer_idx)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            wide: nn.Linear = getattr(self, name)
            setattr(self, name, FewRowsLinear(wide.in_features, wide.out_features, bias=wide.bias is not None))
        self.q_norm = FlexOlmoRMSNorm(self.q_proj.out_features, config.rms_norm_eps)
        self.k_norm = FlexOlmoRMSNorm(self.k_proj.out_features, config.rms_norm_eps)


class FlexOlmoDecoderLayer(upstream.FlexOlmoDecoderLayer):
    """Differs from upstream's layer in its feed-forward part, which is a mixture of named experts."""

    def __init__(self, config: FlexOlmoConfig, layer_idx: int):
        # Upstream's constructor would build the fused experts first, as large as the experts themselves.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = FlexOlmoAttention(config=config, layer_idx=layer_idx)
        self.mlp = FlexOlmoMixture(config, layer_idx)
        self.post_attention_layernorm = FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        expert_selection: Selection | None = None,
        kept_tokens: KeptTokens | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Run attention and the mixture, each with its norm after it and a residual around it.

        Args:
            hidden_states: The residual stream, ``(B, T, H)``.
            expert_selection: Who uses which experts; None for all in memory.
            kept_tokens: Whose logits are asked for; None for all tokens.
            **kwargs: As upstream, for attention.

        Returns:
            The residual stream, ``(B, T, H)``; of the last layer, perhaps that of the kept tokens alone.
        """
        weights = one_token.plain_weights(self, hidden_states, kwargs)
        if weights is not None:
            return self._of_one_token_each(hidden_states, expert_selection, weights, **kwargs)
        attended, _ = self.self_attn(hidden_states=hidden_states, **kwargs)
        if kept_tokens is not None and kept_tokens.leave_others_out(self, attended.shape[1]):
            hidden_states, attended = kept_tokens.of(hidden_states), kept_tokens.of(attended)
        hidden_states = hidden_states + self.post_attention_layernorm(attended)
        return hidden_states + self.post_feedforward_layernorm(self.mlp(hidden_states, expert_selection))

    def _of_one_token_each(
        self,
        hidden_B1H: torch.Tensor,
        selection: Selection | None,
        weights: one_token.Weights,
        position_embeddings: Any,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> torch.Tensor:
        tokens_BH = hidden_B1H.view(len(hidden_B1H), -1)
        attended_BH = one_token.attend(
            self.self_attn, tokens_BH, weights, position_embeddings, attention_mask, past_key_values
        )
        tokens_BH = one_token.add_normed(tokens_BH, attended_BH, self.post_attention_layernorm, weights.attention_norm)
        mixed_BH = None
        if len(tokens_BH) == 1 and type(self.mlp) is FlexOlmoMixture:
            mixed_H = self.mlp.of_one_token(tokens_BH[0], selection)
            mixed_BH = None if mixed_H is None else mixed_H.unsqueeze(0)
        if mixed_BH is None:
            mixed_BH = self.mlp(tokens_BH.view_as(hidden_B1H), selection).view_as(tokens_BH)
        tokens_BH = one_token.add_normed(tokens_BH, mixed_BH, self.post_feedforward_layernorm, weights.mixture_norm)
        return tokens_BH.view_as(hidden_B1H)


works_by_token(FlexOlmoDecoderLayer)
