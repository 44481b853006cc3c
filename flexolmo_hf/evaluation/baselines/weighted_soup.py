"""A soup that weighs its members by the text: their average, weighted by the likelihood of its beginning.

    theta = sum over members i of w_i theta_i,    w = softmax(log p_i(beginning) / temperature)

as in arXiv 2507.07024 (baselines). There the input is a prompt, and in `generate` it is here too. A text that is scored
must not settle the weights that score it: its first tokens do, and are scored by the plain average themselves.

Shape letters: B batch, C tokens in the cache, T tokens of a call, M members, V vocabulary.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch.func import functional_call
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.costs import Cost
from flexolmo_hf.evaluation.baselines.member_weights import (
    check_weighting,
    log_weights,
    precise,
    predicted_by,
    token_log_likelihood,
)
from flexolmo_hf.evaluation.baselines.members import MembersConfig, MembersForCausalLM, mask_of
from flexolmo_hf.evaluation.baselines.soup import differing_settings, weighted_mean
from flexolmo_hf.evaluation.baselines.soup_cache import Context, SoupCache
from flexolmo_hf.modeling.arguments import known_arguments, refuse_unknown


@strict
class WeightedSoupConfig(MembersConfig):
    """Settings of the soup.

    Args:
        temperature: Of the softmax over the members' log-likelihoods.
        top_k: How many members are averaged; None for all.
        prefix: How many of the first tokens settle the weights, the very first included, which nothing predicts. They
            are scored by the plain average. In `generate` the whole prompt settles the weights instead.
        loss: The "sum" over those tokens, which is their log-likelihood, or the "mean".
    """

    model_type = "flexolmo_weighted_soup"

    temperature: float = 1.0
    top_k: int | None = None
    prefix: int = 64
    loss: str = "sum"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the settings."""
        check_weighting(temperature=self.temperature, loss=self.loss, top_k=self.top_k, prefix=self.prefix)
        super().__post_init__(**kwargs)


class WeightedSoupForCausalLM(MembersForCausalLM):
    """Differs from a model in that its weights are an average of its members', made for each row of the batch.

    Rows are computed one after the other, each with its own weights; beside the members, one average is in memory.

    Example:
        >>> model = WeightedSoupForCausalLM.from_members({"public": PUBLIC, "math": MATH})
        >>> model.generate(**inputs)
    """

    config_class = WeightedSoupConfig
    config: WeightedSoupConfig
    cache_class = SoupCache

    def __init__(self, config: WeightedSoupConfig, members: Any = (), **unknown: Any):
        super().__init__(config, members, **unknown)
        shapes = [{name: p.shape for name, p in member.named_parameters()} for member in self.members]
        if any(other != shapes[0] for other in shapes[1:]):
            raise ConfigurationError(
                "The members have parameters of different names or shapes.",
                "Only models of one architecture can be averaged: train them from the same one.",
            )
        for name, member in self.named_members()[1:]:
            if differences := differing_settings(self.members[0].config, member.config):
                raise ConfigurationError(
                    f"Member {name!r} cannot be averaged with the first; they differ in {'; '.join(differences[:4])}.",
                    "Average models that were trained from the same one.",
                )

    def cost(self) -> Cost:
        """Return what a token costs. In a batch whose rows differ, each call builds an average for each row anew."""
        sizes = self.member_parameters()
        return Cost(
            parameters=sum(sizes) + sizes[0],
            parameters_per_token=sizes[0],
            passes_per_token=1,
            # The members, the plain average, and the row's own, which reads it all again.
            passes_per_weight_token=len(sizes) + 2,
            parameters_averaged=sum(sizes),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: SoupCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        weight_tokens: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Compute the logits of each row with the average that its first tokens ask for.

        A row that has fewer tokens than settle its weights is computed with the plain average.

        Args:
            input_ids: Tokens ``(B, T)``.
            attention_mask: ``(B, C + T)``, 0 for padding, on either side; None if there is none.
            position_ids: As upstream.
            past_key_values: What an earlier call returned, or None.
            labels: As upstream.
            use_cache: Whether to return a cache; default as in the configuration, if it is read without labels.
            logits_to_keep: As upstream.
            weight_tokens: How many tokens of each row settle the weights, one number or ``(B,)``; default
                ``config.prefix``.
            **kwargs: What hosts pass along; anything else is refused.

        Returns:
            Logits ``(B, T, V)``, the loss and the cache.

        Raises:
            ConfigurationError: If the cache is another model's, the mask has another form, or `weight_tokens` comes
                when the weights are settled.
            UnknownArgumentError: If nothing reads a keyword.
        """
        refuse_unknown(kwargs, _KNOWN)
        real_BT = mask_of(input_ids, attention_mask)
        given = self._own_cache(past_key_values)
        wanted = given is not None or (self.config.use_cache and labels is None if use_cache is None else use_cache)
        cache = SoupCache() if given is None else given
        self._settle(cache, weight_tokens, input_ids)
        context = cache.append(input_ids, real_BT, position_ids)
        self._settle_weights(cache, context)
        kept = input_ids.shape[1]
        if isinstance(logits_to_keep, int) and logits_to_keep:
            kept = min(kept, logits_to_keep)
        logits_BTV = self._logits(cache, context, new=input_ids.shape[1], kept=kept, keep_cache=wanted)
        if isinstance(logits_to_keep, torch.Tensor):
            logits_BTV = logits_BTV[:, logits_to_keep]
        if given is None:
            # Whoever keeps what is returned does not keep a model with it.
            cache.averaged = None
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache if wanted else None)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generate as upstream does; neither a cache that was given nor one that is returned keeps an average."""
        made = super().generate(*args, **kwargs)
        for cache in (kwargs.get("past_key_values"), getattr(made, "past_key_values", None)):
            if isinstance(cache, SoupCache):
                cache.averaged = None
        return made

    def member_weights(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        weight_tokens: int | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the members' weights ``(B, M)`` for the beginnings of texts, as `forward` uses them.

        Args:
            input_ids: Tokens ``(B, T)``.
            attention_mask: ``(B, T)``.
            weight_tokens: As in `forward`; a row with fewer tokens gets equal weights.
        """
        cache = SoupCache()
        self._settle(cache, weight_tokens, input_ids)
        context = cache.append(input_ids, mask_of(input_ids, attention_mask), None)
        self._settle_weights(cache, context)
        equal_M = self._equal_weights(input_ids.device)
        return torch.stack([equal_M if weights_M is None else weights_M for weights_M in cache.weights])

    @torch.no_grad()
    def _settle_weights(self, cache: SoupCache, context: Context) -> None:
        """Let the members read the beginning of each row that has come to the end of it."""
        limit_B = cache.weight_tokens_B
        assert limit_B is not None
        count_BC = context.real_BC.cumsum(1)
        # Which rows are run one by one is decided here, so the device is waited for.
        enough = (count_BC[:, -1] >= limit_B).tolist()
        rows = [row for row, weights_M in enumerate(cache.weights) if weights_M is None and enough[row]]
        if not rows:
            return
        end = int((count_BC[rows] < limit_B[rows].unsqueeze(1)).sum(1).max()) + 1
        count_BC, columns = count_BC[rows, :end], slice(0, end)
        scored_BC = context.real_BC[rows, :end] & (count_BC > 1) & (count_BC <= limit_B[rows].unsqueeze(1))
        by_BC = predicted_by(context.real_BC[rows, :end])
        inputs = context.part(rows, columns)
        likelihood_BM = torch.zeros(
            len(rows), len(self.members), dtype=precise(count_BC.device), device=count_BC.device
        )
        for index, member in enumerate(self.members):
            logits_BCV = member(**inputs, use_cache=False).logits
            total_BC = logits_BCV.float().logsumexp(-1)
            gave_BC = token_log_likelihood(logits_BCV, total_BC, inputs["input_ids"], by_BC)
            likelihood_BM[:, index] = torch.where(scored_BC, gave_BC, 0.0).sum(1, dtype=likelihood_BM.dtype)
        config = self.config
        weights_BM = log_weights(
            likelihood_BM,
            limit_B[rows] - 1,
            temperature=config.temperature,
            loss=config.loss,
            top_k=config.top_k,
        ).exp()
        for row, weights_M in zip(rows, weights_BM, strict=True):
            cache.weights[row] = weights_M

    def _logits(self, cache: SoupCache, context: Context, *, new: int, kept: int, keep_cache: bool) -> torch.Tensor:
        total = context.ids_BC.shape[1]
        assert cache.weight_tokens_B is not None
        by_plain_BC = context.real_BC.cumsum(1) < cache.weight_tokens_B.unsqueeze(1)
        plain_BK, plain_BKV = by_plain_BC[:, total - kept :], None
        if plain_BK.any():
            end = int(by_plain_BC.sum(1).max())
            inputs = context.part(slice(None), slice(0, end))
            read_BSV = self._run(cache, self._equal_weights(context.ids_BC.device), inputs).logits
            plain_BKV = torch.nn.functional.pad(read_BSV[:, max(total - kept, 0) :], (0, 0, 0, total - end))
        rows = []
        for row, weights_M in enumerate(cache.weights):
            plain_KV = None if plain_BKV is None else plain_BKV[row]
            if weights_M is None:
                assert plain_KV is not None
                rows.append(plain_KV)
                continue
            own_KV = self._row_logits(cache, context, row, weights_M, new, keep_cache)[-kept:]
            rows.append(own_KV if plain_KV is None else torch.where(plain_BK[row].unsqueeze(-1), plain_KV, own_KV))
        return torch.stack(rows)

    def _row_logits(
        self, cache: SoupCache, context: Context, row: int, weights_M: torch.Tensor, new: int, keep_cache: bool
    ) -> torch.Tensor:
        """Return the logits ``(T, V)`` of a row whose weights are settled, and fill its cache."""
        total = context.ids_BC.shape[1]
        start = 0 if cache.rows[row] is None else total - new
        if keep_cache and cache.rows[row] is None:
            cache.rows[row] = DynamicCache(config=self.members[0].config)
        inputs = context.part(slice(row, row + 1), slice(start, total))
        logits_SV = self._run(cache, weights_M, inputs, past_key_values=cache.rows[row], use_cache=keep_cache).logits[0]
        return logits_SV[-new:]

    def _run(self, cache: SoupCache, weights_M: torch.Tensor, inputs: dict[str, Any], **options: Any) -> Any:
        """Run the average with these weights; the one that was built last is used again if it has them."""
        if cache.averaged is None or not torch.equal(cache.averaged[0], weights_M):
            # Not two at a time.
            cache.averaged = None
            cache.averaged = (weights_M, self._average(weights_M.tolist()))
        options.setdefault("use_cache", False)
        return functional_call(self.members[0], cache.averaged[1], args=(), kwargs={**inputs, **options})

    def _average(self, weights: list[float]) -> dict[str, torch.Tensor]:
        # From the heaviest, so that a member that is alone stays as it is, bit for bit.
        first, *others = [index for index in sorted(range(len(weights)), key=lambda i: -weights[i]) if weights[index]]
        parameters = [dict(member.named_parameters()) for member in self.members]
        return {
            name: weighted_mean(
                parameter,
                [parameters[index][name] for index in others],
                [weights[index] for index in others],
                within=torch.promote_types(parameter.dtype, torch.float32),
            )
            for name, parameter in parameters[first].items()
        }

    def _equal_weights(self, device: torch.device) -> torch.Tensor:
        return torch.full((len(self.members),), 1 / len(self.members), dtype=precise(device), device=device)


_KNOWN = known_arguments(WeightedSoupForCausalLM.forward)
