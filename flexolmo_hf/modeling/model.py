"""The network: upstream's FlexOlmo with a `FlexOlmoMixture` of named experts in every layer."""

from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.flex_olmo import modeling_flex_olmo as upstream
from transformers.utils import can_return_tuple

from flexolmo_hf.modeling.arguments import known_arguments, refuse_leftovers, refuse_unknown
from flexolmo_hf.modeling.attribution import Attributable
from flexolmo_hf.modeling.cache_growth import let_grow
from flexolmo_hf.modeling.cache_mark import check_cache, mark_cache
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.files.checkpoint import NamedExpertCheckpoint
from flexolmo_hf.modeling.generation import SetsInGeneration
from flexolmo_hf.modeling.implementation import ExpertsImplementation
from flexolmo_hf.modeling.kept_tokens import KeptTokens, works_by_token
from flexolmo_hf.modeling.layer import FlexOlmoDecoderLayer
from flexolmo_hf.modeling.live import LiveExperts
from flexolmo_hf.modeling.names import parse_expert_set
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm
from flexolmo_hf.modeling.selection import Selection
from flexolmo_hf.modeling.set_key import ExpertSetKeys
from flexolmo_hf.modeling.stamp import Stamp


class FlexOlmoMixtureModel(ExpertsImplementation, NamedExpertCheckpoint, upstream.FlexOlmoModel):
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
        self.norm = FlexOlmoRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = upstream.FlexOlmoRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self._identity = Stamp()
        self._expect_absent_experts()
        # The public expert may be in memory for the sake of low-rank ones alone.
        self._experts_in_memory_changed(parse_expert_set(config.active_experts, config.expert_names))
        self.post_init()

    @property
    def identity(self) -> str:
        """Tells the caches this model filled from those of others, its copies included."""
        return self._identity.id

    @wraps(upstream.FlexOlmoModel.forward)
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        *args: Any,
        active_experts: Any = None,
        kept_tokens: KeptTokens | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run upstream's forward with the experts of this call, refusing keywords that nothing reads.

        Args:
            input_ids: As upstream.
            *args: As upstream.
            active_experts: Names for the whole batch; a list with names, or None, for each row; a bool mask ``(E,)`` or
                ``(B, E)`` over the experts in memory; None for the set in force.
            kept_tokens: From a head that reads these tokens alone, and looks whether the others were left out.
            **kwargs: As upstream; a head passes those it does not know on.
        """
        refuse_unknown(kwargs, _BACKBONE_ARGUMENTS)
        if not isinstance(kept_tokens, KeptTokens | None):
            refuse_unknown(["kept_tokens"], _BACKBONE_ARGUMENTS)
        cache = kwargs.get("past_key_values", args[2] if len(args) > 2 else None)
        given = input_ids if input_ids is not None else kwargs.get("inputs_embeds")
        selection = self.select_experts(active_experts, None if given is None else given.shape[0])
        self.refuse_stale(selection)
        compiling = torch.compiler.is_compiling()
        if cache is not None and not (compiling and selection.checked):
            self._check_cache(cache, selection)
        if cache is not None and not compiling:
            let_grow(cache)
        if kept_tokens is not None:
            kwargs["kept_tokens"] = kept_tokens
        outputs = super().forward(input_ids, *args, expert_selection=selection, **kwargs)
        if cache is None and not compiling:
            self._mark_new_cache(outputs, selection)
        # Another thread may have let an expert come or go while the layers ran.
        self.refuse_stale(selection)
        return outputs

    def _check_cache(self, cache: Any, selection: Selection) -> None:
        config = self.config
        # As upstream's attention has it; a library may have wrapped the module itself.
        width = getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
        shape = (config.num_hidden_layers, config.num_key_value_heads, width)
        check_cache(cache, self.identity, selection.names, shape)

    def _mark_new_cache(self, outputs: Any, selection: Selection) -> None:
        parts = outputs if isinstance(outputs, tuple) else (outputs.get("past_key_values"),)
        for part in parts:
            if isinstance(part, Cache):
                mark_cache(part, self.identity, selection.names)
                let_grow(part)

    def _apply(self, fn: Any, recurse: bool = True) -> "FlexOlmoMixtureModel":
        self.refuse_set_by_hand()
        before = self.active_experts
        super()._apply(fn, recurse)
        # What was resolved holds tensors of the former device.
        self._experts_in_memory_changed(before)
        return self


class FlexOlmoForCausalLM(
    ExpertsImplementation,
    LiveExperts,
    ExpertSetKeys,
    SetsInGeneration,
    Attributable,
    NamedExpertCheckpoint,
    upstream.FlexOlmoForCausalLM,
):
    """Differs from upstream's `FlexOlmoForCausalLM` in its backbone, and in that experts can be chosen by name.

    Example:
        >>> model = AutoModelForCausalLM.from_pretrained(path, active_experts=["public", "math"])
        >>> with model.use_experts("public"):
        ...     model.generate(**inputs)
        >>> model.generate(**two_prompts, active_experts=[["public"], ["public", "math"]])
    """

    config: FlexOlmoConfig
    config_class = FlexOlmoConfig
    _no_split_modules = ["FlexOlmoDecoderLayer"]

    def __init__(self, config: FlexOlmoConfig, **unknown: Any):
        refuse_leftovers(unknown)
        upstream.FlexOlmoPreTrainedModel.__init__(self, config)
        self.model = FlexOlmoMixtureModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = FewRowsLinear(config.hidden_size, config.vocab_size, bias=False)
        self.router_aux_loss_coef = config.router_aux_loss_coef
        self._active_experts_changed()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        active_experts: Any = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Run upstream's forward with the experts of this call.

        Args:
            input_ids: As upstream.
            attention_mask: As upstream.
            position_ids: As upstream.
            past_key_values: As upstream; filled by this model and these sets, or empty.
            inputs_embeds: As upstream.
            labels: As upstream.
            use_cache: As upstream.
            output_router_logits: As upstream: logits ``(B*T, A)`` per layer. Where rows use different sets, A is all
                experts in memory, and what a row may not use has -inf.
            logits_to_keep: As upstream.
            active_experts: Who may use what in this call. Names (``["public", "math"]``) for the whole batch; a list
                with names, or None for the set in force, for each row; a bool mask ``(E,)`` or ``(B, E)`` over
                `expert_names`; None for the set in force.
            **kwargs: As upstream; what nothing reads is refused.

        Raises:
            UnknownExpertError, ExpertNotLoadedError, DuplicateExpertError, EmptyExpertSetError, ExpertTypeError: If a
            set is none of this model's. ExpertRowsError: If the sets do not fit the batch. CacheExpertSetError,
            ForeignCacheError: If another set or model filled `past_key_values`. ConfigurationError: If that is no cache
            of a decoder, or the configuration's set was changed by hand. UnknownArgumentError: If nothing reads a
            keyword.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if active_experts is not None:
            given = input_ids if input_ids is not None else inputs_embeds
            active_experts = self.select_experts(active_experts, None if given is None else given.shape[0])
        elif isinstance(self.model, FlexOlmoMixtureModel) and not torch.compiler.is_compiling():
            self.refuse_set_by_hand()
        # The backbone's own, which a caller cannot give.
        refuse_unknown(kwargs.keys() & {"kept_tokens"}, _BACKBONE_ARGUMENTS)
        kept, more = None, {}
        if type(self.model) is FlexOlmoMixtureModel and not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            kept = KeptTokens(self.model, logits_to_keep)
            more = {"kept_tokens": kept}
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            active_experts=active_experts,
            **more,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if kept is None or not kept.done:
            hidden_states = slice_logits_to_keep(hidden_states, logits_to_keep)
        logits = self.lm_head(hidden_states)
        loss = None if labels is None else self.loss_function(logits, labels, self.vocab_size, **kwargs)
        aux_loss = None
        if output_router_logits:
            aux_loss = self._load_balancing_loss(outputs.router_logits, attention_mask, active_experts)
            if loss is not None:
                loss = loss + self.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )

    def _load_balancing_loss(
        self, router_logits: Any, attention_mask: torch.Tensor | None, selection: Selection | None
    ) -> Any:
        # Upstream's loss counts the experts that have a logit; where rows differ, each token counts as many choices as
        # the row with the fewest experts has, so that nothing a row may not use is ever counted.
        narrowest = self.num_experts if selection is None else selection.narrowest
        return upstream.load_balancing_loss_func(
            router_logits,
            router_logits[0].shape[-1] if router_logits else self.num_experts,
            min(self.config.num_experts_per_tok, narrowest),
            attention_mask,
        )

    def mark_cache(self, cache: Any, active_experts: Any = None) -> None:
        """Vouch for a cache: this model and these experts filled it.

        A cache that went through this model is marked already; one that was rebuilt from its tensors, or read from a
        file, is not.

        Args:
            cache: A `transformers.Cache`.
            active_experts: As in `forward`.

        Raises:
            FlexOlmoError: As `forward` does for a set that is none of this model's, and for what is no cache.
        """
        mark_cache(cache, self.model.identity, self.select_experts(active_experts).names)

    def _active_experts_changed(self) -> None:
        # Upstream's load-balancing loss counts over these two.
        self.num_experts = len(self.active_experts)
        self.num_experts_per_tok = min(self.config.num_experts_per_tok, self.num_experts)

    @classmethod
    def from_dense(cls, dense: Any, **options: Any) -> "FlexOlmoForCausalLM":
        """Make a FlexOlmo model from a dense OLMo-2 model; see `flexolmo_hf.modeling.upcycling.upcycle`."""
        from flexolmo_hf.modeling.upcycling import upcycle

        return upcycle(dense, model_class=cls, **options)


_BACKBONE_ARGUMENTS = known_arguments(upstream.FlexOlmoModel.forward) | {"active_experts"}
works_by_token(FlexOlmoMixtureModel)
