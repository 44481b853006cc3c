"""Measuring how much of each domain's tokens each expert works on, layer by layer (arXiv 2507.07024, figure 2)."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.routing_shares.batches import Documents, batches
from flexolmo_hf.evaluation.routing_shares.one_set import one_set
from flexolmo_hf.evaluation.routing_shares.result import RoutingShares
from flexolmo_hf.evaluation.routing_shares.tally import Tally, buckets
from flexolmo_hf.evaluation.windows import refuse_beyond, refuse_sizes, window_length


def routing_shares(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Mapping[str, Iterable[str]],
    *,
    max_length: int | None = None,
    batch_size: int = 8,
    active_experts: Any = None,
    top_k: int | None = None,
) -> RoutingShares:
    """Measure the experts' shares of the tokens of some domains.

    It costs a forward pass without the head. Documents are read one after the other and cut into windows as
    `bits_per_byte` cuts them; every token of every text is counted once, the token before a document and padding never.
    No token and no text is kept.

    Args:
        model: A FlexOlmo model. It is measured in evaluation mode and put back.
        tokenizer: Its tokenizer.
        texts: Documents of each domain. A domain that has the name of an expert is taken for its own.
        max_length: As in `bits_per_byte`.
        batch_size: Windows the model reads at once.
        active_experts: One set for everything, as in `forward`; None for the set in force.
        top_k: How many of a token's strongest experts count as picked; None for as many as the model uses.

    Returns:
        The shares.

    Raises:
        ConfigurationError: If a size is too small, a window longer than the model has positions, `top_k` is more than
            the model uses, or a domain holds no text.
        NonFiniteTensorError: If the model computes something that is no number.
        FlexOlmoError: As `one_set` does, for a model without experts too.
    """
    selection = one_set(model, active_experts)
    used = min(model.config.num_experts_per_tok, selection.widest)
    top_k = used if top_k is None else top_k
    max_length = window_length(model.config, max_length)
    refuse_sizes(max_length, batch_size)
    if not 1 <= top_k <= used:
        raise ConfigurationError(
            f"top_k is {top_k}.", f"Give a number from 1 to {used}, as many experts as each token uses here."
        )
    if not texts:
        raise ConfigurationError("There is no domain to measure.", "Give documents of at least one.")
    experts = list(selection.names[0])
    sizes = {"experts": len(experts), "top_k": top_k, "max_length": max_length}
    tallies, documents = [], []
    for domain, given in texts.items():
        tally, of_domain = Tally(domain, layers=len(model.mixtures), **sizes), Documents(domain, given)
        for batch in batches(tokenizer, of_domain, max_length=max_length, batch_size=batch_size):
            refuse_beyond(model.config, batch.ids.shape[1])
            found = model.attribution(
                batch.ids.to(model.device), batch.mask.to(model.device), active_experts=selection
            ).weights
            tally.add(found, batch.position)
        if not tally.tokens.sum():
            raise no_text(domain)
        tallies.append(tally)
        documents.append(of_domain.read)
    public = model.config.expert_names[0]
    return _shares(tallies, documents, experts, public if public in experts else None, max_length)


def no_text(domain: str) -> ConfigurationError:
    """Make the error of a domain without text."""
    return ConfigurationError(f"Domain {domain!r} has no text.", "Give at least one document that is not empty.")


def _shares(
    tallies: list[Tally], documents: list[int], experts: list[str], public: str | None, max_length: int
) -> RoutingShares:
    def stack(parts: Iterable[torch.Tensor]) -> np.ndarray:
        return torch.stack(list(parts)).numpy()

    totals = [tally.tokens.sum() for tally in tallies]
    pairs = list(zip(tallies, totals, strict=True))
    return RoutingShares(
        experts=experts,
        public=public,
        domains=[tally.domain for tally in tallies],
        documents=documents,
        tokens=[int(total) for total in totals],
        top_k=tallies[0].top_k,
        max_length=max_length,
        buckets=buckets(max_length),
        weight=stack(tally.weight.sum(dim=0) / total for tally, total in pairs),
        top1=stack(tally.top1 / total for tally, total in pairs),
        picks=stack(tally.picks / (total * tally.top_k) for tally, total in pairs),
        entropy=stack(tally.entropy / total for tally, total in pairs),
        agreement=stack(tally.agreement / total for tally, total in pairs),
        bucket_tokens=stack(tally.tokens for tally in tallies).astype(np.int64),
        # A bucket that no document reaches has no shares: zeros, never a division by zero.
        position=stack(tally.weight / tally.tokens.clamp(min=1)[:, None, None] for tally in tallies),
    )
