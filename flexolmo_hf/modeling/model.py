"""The network: upstream's FlexOlmo with a `FlexOlmoMixture` of named experts in every layer."""

from functools import wraps
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling.arguments import known_arguments, refuse_leftovers, refuse_unknown
from flexolmo_hf.modeling.checkpoint import NamedExpertCheckpoint
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.mixture import FlexOlmoMixture


class FlexOlmoDecoderLayer(upstream.FlexOlmoDecoderLayer):
    """Differs from upstream's layer in its feed-forward part only."""

    def __init__(self, config: FlexOlmoConfig, layer_idx: int):
        # Upstream's constructor would build the fused experts first, as large as the experts themselves.
        GradientCheckpointingLayer.__init__(self)
        self.hidden_size = config.hidden_size
        self.self_attn = upstream.FlexOlmoAttention(config=config, layer_idx=layer_idx)
        self.mlp = FlexOlmoMixture(config)
        self.post_attention_layernorm = upstream.FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_feedforward_layernorm = upstream.FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)


class FlexOlmoMixtureModel(NamedExpertCheckpoint, upstream.FlexOlmoModel):
    """Differs from upstream's `FlexOlmoModel` in that experts are named, separate, and may be absent.

    Its class name is its own on purpose: weights are mapped by class name, and upstream's name maps to fused experts.
    """

    config: FlexOlmoConfig
    config_class = FlexOlmoConfig
    _no_split_modules = ["FlexOlmoDecoderLayer"]

    def __init__(self, config: FlexOlmoConfig, **unknown: Any):
        refuse_leftovers(unknown)
        upstream.FlexOlmoPreTrainedModel.__init__(self, config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList([FlexOlmoDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = upstream.FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = upstream.FlexOlmoRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self._expect_absent_experts()
        self.set_active_experts(None)
        self.post_init()

    @wraps(upstream.FlexOlmoModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run upstream's forward, refusing keywords that nothing reads; a head passes those it does not know on."""
        refuse_unknown(kwargs, _BACKBONE_ARGUMENTS)
        return super().forward(*args, **kwargs)


class FlexOlmoForCausalLM(NamedExpertCheckpoint, upstream.FlexOlmoForCausalLM):
    """Differs from upstream's `FlexOlmoForCausalLM` in its backbone, and in that experts can be chosen by name.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, active_experts=["public", "math"])
        >>> with model.use_experts("public"):
        ...     model.generate(**inputs)
    """

    config: FlexOlmoConfig
    config_class = FlexOlmoConfig
    _no_split_modules = ["FlexOlmoDecoderLayer"]

    def __init__(self, config: FlexOlmoConfig, **unknown: Any):
        refuse_leftovers(unknown)
        upstream.FlexOlmoPreTrainedModel.__init__(self, config)
        self.model = FlexOlmoMixtureModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self._active_experts_changed()
        self.post_init()

    def _active_experts_changed(self) -> None:
        # Upstream's load-balancing loss counts over these two.
        self.num_experts = len(self.active_experts)
        self.num_experts_per_tok = min(self.config.num_experts_per_tok, self.num_experts)

    @classmethod
    def from_dense(cls, dense: Any, **options: Any) -> "FlexOlmoForCausalLM":
        """Make a FlexOlmo model from a dense OLMo-2 model; see `flexolmo_hf.modeling.upcycling.upcycle`."""
        from flexolmo_hf.modeling.upcycling import upcycle

        return upcycle(dense, model_class=cls, **options)


_BACKBONE_ARGUMENTS = known_arguments(upstream.FlexOlmoModel.forward)
