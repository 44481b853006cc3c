"""The domain embedding: the mean of an encoder's embeddings of some documents, where a router row starts.

Shape letters: B documents, W width of the encoder, H hidden, L layers.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers.utils import logging

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.embedded_row import EmbeddedRow, RouterProjection, check_scale, rescaled
from flexolmo_hf.routing.encoders import SELF, Encode, open_encoder
from flexolmo_hf.routing.hidden_states import HiddenStates
from flexolmo_hf.routing.projection import orthonormal_projection
from flexolmo_hf.routing.sampling import sample_texts

logger = logging.get_logger(__name__)

#: Norm that rows are brought to; those of the reference repository have 0.41 to 0.55.
ROW_SCALE = 0.5


@dataclass(frozen=True, eq=False)
class DomainEmbedding(EmbeddedRow):
    """A domain embedding, ready to be a router row, and what it was made of.

    Attributes:
        documents: How many documents it is the mean of.
        empty: How many had no visible character and were left out.
        non_finite: How many the encoder gave NaN or infinity for, and were left out.
    """

    documents: int = 0
    empty: int = 0
    non_finite: int = 0

    @property
    def dropped(self) -> int:
        """How many documents were left out."""
        return self.empty + self.non_finite

    def save(self, path: str | os.PathLike) -> None:
        """Write the embedding to a file; see `flexolmo_hf.routing.embedding_file.save_embedding`."""
        from flexolmo_hf.routing.embedding_file import save_embedding

        save_embedding(self, path)


def domain_embedding(
    texts: Iterable[str],
    *,
    encoder: Any,
    hidden_size: int | None = None,
    sample: int = 1000,
    seed: int = 0,
    scale: float | None = ROW_SCALE,
    batch_size: int = 32,
    encoder_name: str = "",
    model: Any = None,
    tokenizer: Any = None,
    per_layer: bool = False,
) -> DomainEmbedding:
    """Embed a domain, to start an expert's router row from (arXiv 2507.07024).

    Args:
        texts: Documents; read once, and only a sample is kept in memory.
        encoder: The folder or Hub repository of a sentence-transformers model; such a model; a function from a list of
            texts to an array ``(B, W)``; or ``"self"``, the anchor's own hidden states.
        hidden_size: The model's. Embeddings of another width are projected to it; None leaves them.
        sample: How many documents to embed at most.
        seed: Of the projection, the same for all owners, and of the sample.
        scale: Norm of the row, of each layer's with `per_layer`; None leaves the mean as it is.
        batch_size: Documents the encoder is given at once.
        encoder_name: The encoder's public name, to be recorded in models and packages; a path is refused.
        model: For ``"self"``: an `Olmo2ForCausalLM`, or a `FlexOlmoForCausalLM`, which uses its public expert alone.
        tokenizer: For ``"self"``: its tokenizer.
        per_layer: For ``"self"``: a row ``(L, H)`` with a vector for each layer instead of their mean.

    Returns:
        The embedding, float32, with the number of documents it rests on.

    Raises:
        ConfigurationError: If no document is usable, the encoder gives something else than one vector per document, or
            a setting makes no sense.
        CheckpointNotFoundError, MissingExtraError, NotOlmo2Error: If the encoder cannot be had.
    """
    check_scale(scale)
    for name, value in {"batch_size": batch_size, "hidden_size": hidden_size}.items():
        if value is not None and value < 1:
            raise ConfigurationError(f"{name} is {value}.", "It is at least 1.")
    encode = open_encoder(encoder, model=model, tokenizer=tokenizer, per_layer=per_layer)
    if isinstance(encode, HiddenStates):
        hidden_size = _own_width(encode, hidden_size, encoder_name)
        encoder_name = SELF
    # Before the work: a name or seed that is refused should not cost the embeddings.
    RouterProjection(encoder_width=1, seed=seed, encoder=encoder_name)
    documents, empty = sample_texts(texts, sample=sample, seed=seed)
    mean, used = _mean(encode, documents, batch_size, layered=per_layer)
    non_finite = len(documents) - used
    if not used:
        raise ConfigurationError(
            f"No document could be used: {empty} are empty, and {non_finite} have an embedding that is not finite.",
            "Give documents with text, and try the encoder on one of them.",
        )
    if non_finite:
        logger.warning("%d of %d documents were left out: their embedding is not finite.", non_finite, len(documents))
    width = mean.shape[-1]
    projected = hidden_size is not None and hidden_size != width
    if projected:
        mean = mean @ orthonormal_projection(width, int(hidden_size or 0), seed=seed)
    vector = mean if scale is None else rescaled(mean, scale)
    projection = RouterProjection(encoder_width=width, seed=seed if projected else None, encoder=encoder_name)
    return DomainEmbedding(vector.float(), projection, scale, used, empty, non_finite)


def _own_width(encode: HiddenStates, hidden_size: int | None, encoder_name: str) -> int:
    if hidden_size not in (None, encode.hidden_size):
        raise ConfigurationError(
            f"hidden_size is {hidden_size}, but the anchor is the encoder, and its own is {encode.hidden_size}.",
            "Leave it out.",
        )
    if encoder_name not in ("", SELF):
        raise ConfigurationError(f"With encoder={SELF!r} the encoder's name is {SELF!r}.", "Leave encoder_name out.")
    return encode.hidden_size


def _mean(encode: Encode, documents: Sequence[str], batch_size: int, *, layered: bool) -> tuple[torch.Tensor, int]:
    """Return the mean over documents in float64, ``(W,)`` or ``(L, H)``, and how many have a finite embedding."""
    total, used = torch.zeros(()), 0
    for start in range(0, len(documents), batch_size):
        batch = documents[start : start + batch_size]
        embeddings = _as_tensor(encode(batch), len(batch), dimensions=3 if layered else 2)
        finite = torch.isfinite(embeddings).flatten(1).all(dim=1)
        if start and embeddings.shape[1:] != total.shape:
            raise ConfigurationError(
                f"The encoder gave embeddings of width {total.shape[-1]} and then of width {embeddings.shape[-1]}.",
                "An encoder has one width.",
            )
        # Left out rather than multiplied by zero: zero times NaN is NaN.
        total, used = total + embeddings[finite].sum(dim=0), used + int(finite.sum())
    return total / max(used, 1), used


def _as_tensor(embeddings: Any, texts: int, *, dimensions: int) -> torch.Tensor:
    if not isinstance(embeddings, torch.Tensor):
        try:
            embeddings = torch.from_numpy(np.asarray(embeddings, dtype=np.float64))
        except (TypeError, ValueError):
            # The cause would quote what is no number, which may be the text itself.
            raise ConfigurationError(
                f"The encoder gave a {type(embeddings).__name__} that is no array of numbers.",
                "It gives one vector per text, all of one width.",
            ) from None
    if embeddings.dim() != dimensions or len(embeddings) != texts or not embeddings.shape[-1]:
        raise ConfigurationError(
            f"The encoder gave an array of shape {tuple(embeddings.shape)} for {texts} texts.",
            "It gives one vector per text, all of one width.",
        )
    return embeddings.detach().to("cpu", torch.float64)
