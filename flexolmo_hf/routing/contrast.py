"""Contrast rows: router rows that tell an owner's tokens from public ones.

A domain embedding says what a domain's text is like; much of that is what all text is like. A contrast row is what a
linear classifier of tokens weighs, so that its score is the log-odds that a token is the owner's and not public. The
public row is then zero. Every owner makes one alone: public text is public.

Shape letters: N tokens, H hidden, L layers.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError, NonFiniteTensorError
from flexolmo_hf.modeling.embedded_row import RouterProjection
from flexolmo_hf.routing.domain_embedding import DomainEmbedding
from flexolmo_hf.routing.hidden_states import HiddenStates
from flexolmo_hf.routing.sampling import sample_texts

#: Recorded in place of an encoder's name: rows of this kind do not mix with others.
CONTRAST = "contrast"
_AT_ONCE = 16


def contrast_embedding(
    texts: Iterable[str],
    public_texts: Iterable[str],
    *,
    model: Any,
    tokenizer: Any,
    sample: int = 200,
    tokens: int = 20_000,
    seed: int = 0,
    freedom: float = 0.01,
) -> DomainEmbedding:
    """Make the router row of an expert from the owner's texts and public ones.

    Give the public expert no row: its own is zero, against which the log-odds count. Take none for other experts of the
    same model from `domain_embedding`, which are measured in something else.

    Args:
        texts: The owner's documents; read once, and only a sample is kept in memory.
        public_texts: Documents of the public model's training text.
        model: The anchor, an `Olmo2ForCausalLM` or a `FlexOlmoForCausalLM`, whose public expert is used alone.
        tokenizer: Its tokenizer.
        sample: How many documents of each kind to read at most.
        tokens: How many tokens of each kind to learn from at most; about ``12 * tokens * L * H`` bytes are needed.
        seed: Of the samples.
        freedom: Inverse of the penalty on the weights, scikit-learn's ``C``.

    Returns:
        A row for each layer ``(L, H)``, as long as the classifier made it.

    Raises:
        ConfigurationError: If there is no text of a kind, or a setting makes no sense.
        NonFiniteTensorError: If the model makes something of a text that is no number.
        MissingExtraError: If scikit-learn is not installed.
        NotOlmo2Error: If the model is of another architecture.
    """
    require("routing", "sklearn")
    if tokens < 1 or freedom <= 0:
        raise ConfigurationError(f"tokens={tokens} and freedom={freedom} teach nothing.", "Both are above 0.")
    encode = HiddenStates(model, tokenizer, per_layer=True)
    own_NLH, documents, empty = _states(encode, texts, "the owner's", sample, tokens, seed)
    public_NLH, _, _ = _states(encode, public_texts, "public", sample, tokens, seed)
    rows = [_weights(own_NLH[:, layer], public_NLH[:, layer], freedom) for layer in range(own_NLH.shape[1])]
    projection = RouterProjection(encoder_width=encode.hidden_size, seed=None, encoder=CONTRAST)
    return DomainEmbedding(torch.stack(rows).float(), projection, None, documents, empty, 0)


def _states(
    encode: HiddenStates, texts: Iterable[str], whose: str, sample: int, tokens: int, seed: int
) -> tuple[torch.Tensor, int, int]:
    """Return the tokens' states ``(N, L, H)``, how many documents they are from, and how many were empty."""
    documents, empty = sample_texts(texts, sample=sample, seed=seed)
    parts, found, read = [], 0, 0
    for start in range(0, len(documents), _AT_ONCE):
        some = documents[start : start + _AT_ONCE]
        parts.append(encode.of_tokens(some)[: tokens - found])
        found, read = found + len(parts[-1]), read + len(some)
        if found >= tokens:
            break
    if not found:
        raise ConfigurationError(f"There is no text among {whose} documents.", "Give documents with text.")
    states_NLH = torch.cat(parts)
    if not states_NLH.isfinite().all():
        raise NonFiniteTensorError("hidden states", f"{whose} documents")
    return states_NLH, read, empty


def _weights(own_NH: torch.Tensor, public_NH: torch.Tensor, freedom: float) -> torch.Tensor:
    from sklearn.linear_model import LogisticRegression

    states_NH = torch.cat([own_NH, public_NH]).double().numpy()
    is_own_N = np.repeat([True, False], [len(own_NH), len(public_NH)])
    # No intercept: a router has none but the negative bias, which is trained.
    model = LogisticRegression(C=freedom, fit_intercept=False, class_weight="balanced", max_iter=500)
    return torch.from_numpy(model.fit(states_NH, is_own_N).coef_[0])
