"""How likely a model finds continuations, one by one or many that share their contexts.

Requests are cut into a tree of shared beginnings (`prefix_tree`): a few-shot prompt is read once, a question once for
all its choices, and what follows continues from their keys and values. Tokens at the border between context and
continuation are those of lm-evaluation-harness, so that the figures compare.

Shape letters: B nodes in a batch, P tokens in the cache, T new tokens, K positions whose logits are needed, N scored
positions, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.members import MembersForCausalLM
from flexolmo_hf.evaluation.baselines.prompt_routing import PromptRoutedForCausalLM
from flexolmo_hf.evaluation.baselines.settled_by_prompt import SettledByPrompt
from flexolmo_hf.evaluation.suite.offline.encoding import Request, encode
from flexolmo_hf.evaluation.suite.offline.prefix_tree import Node, plant

# So many requests are in tokens at a time: the questions of a large task would fill the memory.
_REQUESTS = 8192
# A cached token costs memory but no work: so many of them count as one of `batch_tokens`.
_CACHED = 8
# Logits of one batch, in numbers: half a gigabyte in float32. They are what grows with the vocabulary.
_LOGITS = 2**27
# Of those, so many are turned into log-probabilities at once.
_AT_ONCE = 2**25


@dataclass(frozen=True)
class Score:
    """What a model makes of a continuation.

    Attributes:
        logprob: Its log-probability in nats, summed over its tokens.
        tokens: How many tokens those are.
        greedy: Whether each of them was the model's first choice.
    """

    logprob: float
    tokens: int
    greedy: bool


def can_share_prefixes(model: PreTrainedModel) -> bool:
    """Tell whether a model's keys and values of a context may be used for several continuations.

    They may not where the model keeps a state beside them, sees only a window of them, or is made of several models.
    """
    if isinstance(model, (MembersForCausalLM, PromptRoutedForCausalLM)):
        return False
    layers = DynamicCache(config=model.config).layers
    return not model._is_stateful and all(type(layer) is DynamicLayer for layer in layers)


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    share_prefixes: bool = True,
    active_experts: Sequence[str] | None = None,
) -> list[Score]:
    """Measure the log-probability of each continuation, given its context.

    Where the beginning of a text settles how the rest is computed (prompt routing, weighted soups), the whole context
    does, and nothing of the continuation; without a context, the model's default holds.

    Args:
        model: The model. It is put into evaluation mode for the measurement.
        tokenizer: Its tokenizer.
        requests: Contexts and continuations; equal ones are computed once.
        batch_tokens: Tokens the model reads at once, padding included.
        max_length: Tokens a model may see; longer contexts lose their beginning, and a continuation that does not fit
            is scored piece by piece. None for what the model's configuration says.
        share_prefixes: Whether contexts are computed once for all that begin with them. It takes a model whose cache
            can be continued more than once; see `can_share_prefixes`.
        active_experts: For FlexOlmo models, the experts in force; None for those that are.

    Returns:
        One score per request, in their order.

    Raises:
        ConfigurationError: If a size is too small, a continuation has no token, prefixes cannot be shared, or a
            log-probability is NaN.
    """
    if batch_tokens < 1 or (max_length is not None and max_length < 1):
        raise ConfigurationError(
            f"batch_tokens={batch_tokens} and max_length={max_length} leave nothing to score.",
            "Both are at least 1.",
        )
    if share_prefixes and not can_share_prefixes(model):
        raise ConfigurationError(
            f"{type(model).__name__} cannot continue one context several times.",
            "Only a model whose whole state is its cache of keys and values can. Score it with share_prefixes=False.",
        )
    longest = max_length or model.config.get_text_config().max_position_embeddings
    call = {} if active_experts is None else {"active_experts": active_experts}
    by_prompt = isinstance(model, SettledByPrompt) and model.prompt_argument is not None
    scores: list[Score] = []
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(requests), _REQUESTS):
            part = requests[start : start + _REQUESTS]
            pieces = encode(tokenizer, part, longest)
            roots = plant(
                [piece.inputs for piece in pieces],
                [piece.targets for piece in pieces],
                share=share_prefixes,
                prompts=[piece.prompt for piece in pieces] if by_prompt else None,
            )
            reader = _Reader(model, batch_tokens, share_prefixes, call, len(pieces))
            with torch.no_grad():
                reader.read(roots, [0] * len(roots), None, None)
            scores.extend(_sum_up(pieces, reader, len(part)))
    finally:
        model.train(was_training)
    return scores


def _sum_up(pieces: Sequence[Any], reader: "_Reader", count: int) -> list[Score]:
    if reader.logprob.isnan().any():
        raise ConfigurationError(
            "The model gives NaN where log-probabilities should be.",
            "Look for NaN in its weights, or try dtype=float32.",
        )
    logprob, tokens, greedy = [0.0] * count, [0] * count, [True] * count
    for piece, nats, first in zip(pieces, reader.logprob.tolist(), reader.greedy.tolist(), strict=True):
        logprob[piece.request] += nats
        tokens[piece.request] += len(piece.targets)
        greedy[piece.request] &= first
    return [Score(*parts) for parts in zip(logprob, tokens, greedy, strict=True)]


class _Reader:
    """Reads a tree of tokens level by level, and writes down the log-probabilities that were asked for."""

    def __init__(self, model: PreTrainedModel, batch_tokens: int, share: bool, call: dict[str, Any], pieces: int):
        self.model, self.batch_tokens, self.share, self.call = model, batch_tokens, share, call
        self.vocabulary = model.config.get_text_config().vocab_size
        # Baselines that mix several models' outputs give all of their logits.
        self.few_logits = model._supports_logits_to_keep()
        self.logprob = torch.zeros(pieces, dtype=torch.float64)
        self.greedy = torch.ones(pieces, dtype=torch.bool)

    def read(self, nodes: Sequence[Node], rows: Sequence[int], cache: Cache | None, seen_BP: Any) -> None:
        """Read nodes, and then what follows them.

        Args:
            nodes: Nodes whose parents have been read together; or the roots.
            rows: For each, the row of its parent in the cache.
            cache: The parents' keys and values; None for the roots. It is used up.
            seen_BP: Which tokens of the cache are no padding, int64.
        """
        past = 0 if seen_BP is None else seen_BP.shape[1]
        batches = list(self._batches(nodes, rows, past))
        for number, (batch, parents) in enumerate(batches):
            last = number == len(batches) - 1
            branch = _branch(cache, parents, last)
            before_BP = None if seen_BP is None else seen_BP[parents]
            children = [(child, row) for row, node in enumerate(batch) for child in node.children]
            filled, seen = self._forward(batch, branch, before_BP, keep=bool(children))
            del branch
            if children:
                self.read([child for child, _ in children], [row for _, row in children], filled, seen)

    def _batches(self, nodes: Sequence[Node], rows: Sequence[int], past: int) -> Iterator[tuple[list[Node], list[int]]]:
        # Those that are continued come first and stay together: only their cache is kept. Then the longest first.
        order = sorted(range(len(nodes)), key=lambda i: (not nodes[i].children, -len(nodes[i].tokens), -nodes[i].kept))
        batch: list[int] = []
        longest = kept = 0
        for i in order:
            wider, more = max(longest, len(nodes[i].tokens)), max(kept, nodes[i].kept)
            apart = batch and bool(nodes[batch[0]].children) != bool(nodes[i].children)
            if batch and (apart or not self._fits(len(batch) + 1, wider, more, past)):
                yield [nodes[j] for j in batch], [rows[j] for j in batch]
                batch, wider, more = [], len(nodes[i].tokens), nodes[i].kept
            batch.append(i)
            longest, kept = wider, more
        if batch:
            yield [nodes[j] for j in batch], [rows[j] for j in batch]

    def _fits(self, count: int, longest: int, kept: int, past: int) -> bool:
        logits = count * (kept if self.few_logits else longest) * self.vocabulary
        work, memory = count * longest, count * (past + longest) / _CACHED
        return max(work, memory) <= self.batch_tokens and logits <= _LOGITS

    def _forward(self, batch: Sequence[Node], cache: Cache | None, seen_BP: Any, *, keep: bool) -> tuple[Any, Any]:
        device = self.model.device
        longest = max(len(node.tokens) for node in batch)
        ids_BT = torch.zeros((len(batch), longest), dtype=torch.long)
        new_BT = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, node in enumerate(batch):
            # With a cache padding comes first, so that what follows a node stands right behind it.
            place = slice(longest - len(node.tokens), longest) if self.share else slice(0, len(node.tokens))
            ids_BT[row, place] = torch.from_numpy(node.tokens)
            new_BT[row, place] = 1
        mask = new_BT if seen_BP is None else torch.cat([seen_BP, new_BT], dim=1)
        kept = max(1, *(self._kept(node, longest) for node in batch))
        options = dict(self.call)
        if isinstance(self.model, SettledByPrompt):
            options |= self.model.prompt_options([node.prompt for node in batch])
        if self.few_logits:
            options["logits_to_keep"] = kept
        if self.share:
            starts_B1 = torch.tensor([[node.start - longest + len(node.tokens)] for node in batch])
            options["position_ids"] = (starts_B1 + torch.arange(longest)).clamp(min=0).to(device)
            options["past_key_values"] = cache
        outputs = self.model(
            input_ids=ids_BT.to(device),
            attention_mask=mask.to(device),
            use_cache=cache is not None or keep,
            **options,
        )
        self._record(batch, outputs.logits, longest)
        return (outputs.past_key_values, mask) if keep else (None, None)

    def _kept(self, node: Node, longest: int) -> int:
        # Counted from the end of the batch: what stands behind the first position that is needed.
        return node.kept if self.share else node.kept + longest - len(node.tokens) if node.kept else 0

    def _record(self, batch: Sequence[Node], logits_BKV: torch.Tensor, longest: int) -> None:
        left_out = longest - logits_BKV.shape[1]
        rows, columns, targets, owners = [], [], [], []
        for row, node in enumerate(batch):
            before = longest - len(node.tokens) if self.share else 0
            for offset, token, owner in node.wanted:
                rows.append(row)
                columns.append(before + offset - left_out)
                targets.append(token)
                owners.append(owner)
        step = max(1, _AT_ONCE // logits_BKV.shape[2])
        for i in range(0, len(rows), step):
            part = slice(i, i + step)
            logits_NV = logits_BKV[rows[part], columns[part]].float()
            targets_N1 = torch.tensor(targets[part], device=logits_NV.device)[:, None]
            chosen_N = logits_NV.gather(1, targets_N1)[:, 0] - logits_NV.logsumexp(1)
            greedy_N = logits_NV.argmax(1) == targets_N1[:, 0]
            owners_N = torch.tensor(owners[part])
            self.logprob.index_add_(0, owners_N, chosen_N.double().cpu())
            self.greedy[owners_N[~greedy_N.cpu()]] = False


def _branch(cache: Cache | None, parents: Sequence[int], last: bool) -> Cache | None:
    # The cache's own methods move its rows, and with them the mark that says whose experts filled it.
    if cache is None:
        return None
    branch = cache if last else copy.deepcopy(cache)
    if len(set(parents)) == 1 and parents[0] == 0 and _rows_of(branch) == 1:
        branch.batch_repeat_interleave(len(parents))
    else:
        branch.batch_select_indices(torch.tensor(parents, device=branch.layers[0].keys.device))
    return branch


def _rows_of(cache: Cache) -> int:
    return cache.layers[0].keys.shape[0]
