"""Branch-train-merge: an ensemble of whole models whose next-token distributions are mixed (arXiv 2507.07024).

    p(x) = sum over members i of w_i p_i(x),    w = softmax(-L / temperature),

where L_i is member i's loss on what it has read, so a token is never weighed by itself or by what follows it.

Shape letters: B batch, C tokens in the cache, T tokens of a call, S tokens of a part of it, M members, V vocabulary.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.costs import Cost
from flexolmo_hf.evaluation.baselines.member_weights import (
    check_weighting,
    last_real_column,
    log_weights,
    precise,
    predicted_by,
    token_log_likelihood,
)
from flexolmo_hf.evaluation.baselines.members import MembersConfig, MembersForCausalLM, mask_of
from flexolmo_hf.evaluation.baselines.members_cache import MembersCache, Seen
from flexolmo_hf.modeling.arguments import known_arguments, refuse_unknown

WEIGHTS_FROM = ("running", "prefix")


@strict
class BranchTrainMergeConfig(MembersConfig):
    """Settings of the ensemble.

    Args:
        temperature: Of the softmax over the members' losses.
        top_k: How many members count, after which the weights are made to add up to 1; None for all.
        weights_from: "running": each token is weighed by all tokens before it. "prefix": the weights are settled by
            the first tokens of a text.
        prefix: How many tokens that are, the very first included, which nothing predicts. While they are read, all
            members weigh the same. In `generate` the whole prompt settles the weights instead.
        loss: L is the "mean" per token or the "sum".
    """

    model_type = "flexolmo_btm"

    temperature: float = 1.0
    top_k: int | None = None
    weights_from: str = "running"
    prefix: int = 64
    loss: str = "mean"

    def __post_init__(self, **kwargs: Any) -> None:
        """Check the settings."""
        check_weighting(temperature=self.temperature, loss=self.loss, top_k=self.top_k, prefix=self.prefix)
        if self.weights_from not in WEIGHTS_FROM:
            raise ConfigurationError(
                f"weights_from={self.weights_from!r} is unknown.",
                f"Choose one of {', '.join(map(repr, WEIGHTS_FROM))}.",
            )
        super().__post_init__(**kwargs)


class BranchTrainMergeForCausalLM(MembersForCausalLM):
    """Differs from a model in that its logits are the logarithms of its members' mixed probabilities.

    Example:
        >>> model = BranchTrainMergeForCausalLM.from_members({"public": PUBLIC, "math": MATH}, top_k=2)
        >>> model.generate(**inputs)
    """

    config_class = BranchTrainMergeConfig
    config: BranchTrainMergeConfig
    cache_class = MembersCache

    @property
    def settles_by_prefix(self) -> bool:
        """Whether the members' weights are settled by the first tokens of a text."""
        return self.config.weights_from == "prefix"

    def cost(self) -> Cost:
        """Return what a token costs. A batch whose rows choose different members runs all of these on all rows."""
        sizes = self.member_parameters()
        run = len(sizes)
        if self.config.weights_from == "prefix" and self.config.top_k is not None:
            run = min(run, self.config.top_k)
        return Cost(
            parameters=sum(sizes),
            # Which of the members are run is the text's choice; they are of one size, as a rule.
            parameters_per_token=sum(sorted(sizes)[-run:]),
            passes_per_token=run,
            passes_per_weight_token=len(sizes),
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: MembersCache | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        weight_tokens: int | torch.Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Mix the members' distributions of the token after each given one.

        Args:
            input_ids: Tokens ``(B, T)``.
            attention_mask: ``(B, C + T)``, 0 for padding, on either side; None if there is none.
            position_ids: As upstream.
            past_key_values: What an earlier call returned, or None.
            labels: As upstream.
            use_cache: Whether to return a cache; default as in the configuration, if it is read without labels.
            logits_to_keep: As upstream.
            weight_tokens: With ``weights_from="prefix"``, how many tokens of each row settle the weights, one number or
                ``(B,)``; default ``config.prefix``.
            **kwargs: What hosts pass along; anything else is refused.

        Returns:
            Logits ``(B, T, V)``, float32, which are normalised log-probabilities; the loss; the cache.

        Raises:
            ConfigurationError: If the cache is another model's, the mask has another form, or `weight_tokens` comes
                when the weights are settled or is not used.
            UnknownArgumentError: If nothing reads a keyword.
        """
        refuse_unknown(kwargs, _KNOWN)
        real_BT = mask_of(input_ids, attention_mask)
        given = self._own_cache(past_key_values)
        wanted = given is not None or (self.config.use_cache and labels is None if use_cache is None else use_cache)
        cache = MembersCache(self.members, keep=wanted) if given is None else given
        self._settle(cache, weight_tokens, input_ids)
        tokens = input_ids.shape[1]
        cut = self._cut(cache, real_BT)
        if cut is not None and not cache.keeps:
            cache.caches = MembersCache(self.members).caches
        first_kept = tokens - logits_to_keep if isinstance(logits_to_keep, int) and logits_to_keep else 0
        parts = [(0, tokens)] if cut is None else [(0, cut), (cut, tokens)]
        logits = []
        for start, end in parts:
            later = tokens - end
            logits_BSV = self._mixed(
                cache,
                input_ids[:, start:end],
                real_BT[:, start:end],
                None if attention_mask is None else attention_mask[:, : attention_mask.shape[1] - later],
                None if position_ids is None else position_ids[..., start:end],
                first_kept=max(first_kept - start, 0),
            )
            logits.append(logits_BSV)
        logits_BTV = torch.cat(logits, dim=1) if len(logits) > 1 else logits[0]
        if isinstance(logits_to_keep, torch.Tensor):
            logits_BTV = logits_BTV[:, logits_to_keep]
        loss = None if labels is None else self.loss_function(logits_BTV, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, past_key_values=cache if wanted else None)

    def _cut(self, cache: MembersCache, real_BT: torch.Tensor) -> int | None:
        """Return the column from which on members may be left out, if that is in the middle of this call."""
        chooses = self.config.weights_from == "prefix" and (self.config.top_k or len(self.members)) < len(self.members)
        if not chooses or cache.recording or cache.seen is not None or real_BT.shape[1] == 1:
            return None
        assert cache.weight_tokens_B is not None
        settled_T = (real_BT.cumsum(1) >= cache.weight_tokens_B.unsqueeze(1)).all(0)
        column = int((~settled_T).sum()) + 1
        return column if column < real_BT.shape[1] else None

    def _mixed(
        self,
        cache: MembersCache,
        ids_BS: torch.Tensor,
        real_BS: torch.Tensor,
        attention_mask: torch.Tensor | None,
        positions: torch.Tensor | None,
        *,
        first_kept: int,
    ) -> torch.Tensor:
        """Read a part of the tokens and return the mixed log-probabilities of the columns from `first_kept` on."""
        run = self._members_to_run(cache, len(ids_BS))
        logits = {
            index: self.members[index](
                input_ids=ids_BS,
                attention_mask=attention_mask,
                position_ids=positions,
                past_key_values=cache.caches[index],
                use_cache=cache.keeps,
            ).logits
            for index in run
        }
        totals = {index: logits_BSV.float().logsumexp(-1) for index, logits_BSV in logits.items()}
        count_BS, likelihood_BSM = self._read(cache, ids_BS, real_BS, logits, totals)
        weights_BSM = self._log_weights(count_BS, likelihood_BSM, cache.weight_tokens_B)
        mixed_BSV = None
        for index, logits_BSV in logits.items():
            shift_BS = weights_BSM[..., index].float() - totals[index]
            part_BSV = logits_BSV[:, first_kept:].float() + shift_BS[:, first_kept:].unsqueeze(-1)
            mixed_BSV = part_BSV if mixed_BSV is None else torch.logaddexp(mixed_BSV, part_BSV)
        assert mixed_BSV is not None
        if cache.keeps:
            cache.seen = self._seen(cache, real_BS, logits, totals, count_BS, likelihood_BSM)
        return mixed_BSV

    def _members_to_run(self, cache: MembersCache, rows: int) -> list[int]:
        everyone = list(range(len(self.members)))
        if (self.config.top_k or len(everyone)) >= len(everyone) or cache.weight_tokens_B is None or cache.seen is None:
            return everyone
        count_B, likelihood_BM = cache.seen.count_BK[:, -1], cache.seen.log_likelihood_BKM[:, -1]
        weights_BM = self._log_weights(count_B, likelihood_BM, cache.weight_tokens_B)
        # Once per call, the device is waited for: what is not run costs nothing.
        settled_and_unused_M = (count_B >= cache.weight_tokens_B).all() & weights_BM.isneginf().all(0)
        return [index for index, unused in enumerate(settled_and_unused_M.tolist()) if not unused]

    def _read(
        self, cache: MembersCache, ids_BS: torch.Tensor, real_BS: torch.Tensor, logits: Any, totals: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many tokens have been read at each column, and what each member gave them so far."""
        seen = cache.seen
        count_BS = real_BS.cumsum(1) + (0 if seen is None else seen.count_BK[:, -1:])
        counts_BS = real_BS & (count_BS > 1)
        if cache.weight_tokens_B is not None:
            counts_BS = counts_BS & (count_BS <= cache.weight_tokens_B.unsqueeze(1))
        before_BS, device = predicted_by(real_BS), ids_BS.device
        likelihood_BSM = torch.zeros((*ids_BS.shape, len(self.members)), dtype=precise(device), device=device)
        for index, logits_BSV in logits.items():
            gave_BS = token_log_likelihood(logits_BSV, totals[index], ids_BS, before_BS)
            if seen is not None:
                gave_BS = torch.where(before_BS >= 0, gave_BS, seen.next_BKMV[:, -1, index].gather(1, ids_BS))
            likelihood_BSM[..., index] = torch.where(counts_BS, gave_BS, 0.0)
        likelihood_BSM = likelihood_BSM.cumsum(1)
        return count_BS, likelihood_BSM if seen is None else likelihood_BSM + seen.log_likelihood_BKM[:, -1:]

    def _log_weights(
        self, count: torch.Tensor, log_likelihood: torch.Tensor, weight_tokens_B: torch.Tensor | None
    ) -> torch.Tensor:
        scored = count - 1
        if weight_tokens_B is not None:
            needed = weight_tokens_B.view(-1, *[1] * (count.dim() - 1))
            scored = torch.where(count >= needed, needed - 1, 0)
        config = self.config
        return log_weights(log_likelihood, scored, temperature=config.temperature, loss=config.loss, top_k=config.top_k)

    def _seen(
        self,
        cache: MembersCache,
        real_BS: torch.Tensor,
        logits: Any,
        totals: Any,
        count_BS: torch.Tensor,
        likelihood_BSM: torch.Tensor,
    ) -> Seen:
        column_BK = last_real_column(real_BS)[:, -cache.columns_to_remember :]
        found_BK1, at_BK = (column_BK >= 0).unsqueeze(-1), column_BK.clamp(min=0)
        row_B1 = torch.arange(len(real_BS), device=real_BS.device).unsqueeze(1)
        size = (*at_BK.shape, len(self.members), self.config.vocab_size)
        next_BKMV = next(iter(totals.values())).new_zeros(size)
        for index, logits_BSV in logits.items():
            next_BKV = logits_BSV[row_B1, at_BK].float() - totals[index].gather(1, at_BK).unsqueeze(-1)
            if cache.seen is not None:
                next_BKV = torch.where(found_BK1, next_BKV, cache.seen.next_BKMV[:, -1:, index])
            next_BKMV[:, :, index] = next_BKV
        columns = at_BK.shape[1]
        return Seen(count_BS[:, -columns:], likelihood_BSM[:, -columns:], next_BKMV)


_KNOWN = known_arguments(BranchTrainMergeForCausalLM.forward)
