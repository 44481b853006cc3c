"""How well the domains can be told apart: each held-out text goes to the domain whose mean embedding is nearest.

Shapes: D domains, N texts, W width of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.corpus import Corpus
from flexolmo_hf.evaluation.figures import COLOURS, figure, save
from flexolmo_hf.routing.encoders import Encode, open_encoder

#: What stands for an encoder where none is given.
TFIDF = "TF-IDF"
_AT_ONCE = 32
_LONGEST = 4_000
_WORDS = 20_000


@dataclass(frozen=True)
class Separability:
    """Which domain held-out texts were taken for.

    Attributes:
        domains: Their names.
        confusion_DD: Texts of each domain (row) that were taken for each (column), int.
        encoder: What embedded them, in words; an encoder in a folder by the folder's name.
    """

    domains: tuple[str, ...]
    confusion_DD: np.ndarray
    encoder: str

    @property
    def accuracy(self) -> dict[str, float]:
        """Return the share of each domain's texts that was taken for it."""
        right = np.diagonal(self.confusion_DD) / self.confusion_DD.sum(axis=1)
        return dict(zip(self.domains, right.tolist(), strict=True))


def separability(
    corpus: Corpus, encoder: Any = None, *, documents: int = 100, learnt: str = "train", judged: str = "test"
) -> Separability:
    """Tell the domains of a corpus apart by the nearest centroid.

    Args:
        corpus: The corpus.
        encoder: What `routing.encoders.open_encoder` takes; None for TF-IDF of words.
        documents: Texts per domain, for the centroids and again to judge: evenly spread over a split.
        learnt: Split that the centroids come from.
        judged: Split whose texts are judged.

    Raises:
        ConfigurationError: If the corpus has fewer than two domains, or no texts are asked for.
        CheckpointNotFoundError, MissingExtraError: If the encoder cannot be had.
    """
    domains = corpus.domains
    if len(domains) < 2:
        raise ConfigurationError(f"The corpus has {len(domains)} domain.", "Build two or more to tell them apart.")
    if documents < 1:
        raise ConfigurationError(f"{documents} texts tell nothing.", "Ask for one or more per domain.")
    known = [_spread(corpus.documents(domain, learnt), documents) for domain in domains]
    asked = [_spread(corpus.documents(domain, judged), documents) for domain in domains]
    encode = _tfidf([text for texts in known for text in texts]) if encoder is None else open_encoder(encoder)
    centroid_DW = _unit(np.stack([_embed(encode, texts).mean(axis=0) for texts in known]))
    confusion_DD = np.zeros((len(domains), len(domains)), int)
    for row, texts in enumerate(asked):
        taken_for = (_embed(encode, texts) @ centroid_DW.T).argmax(axis=1)
        confusion_DD[row] = np.bincount(taken_for, minlength=len(domains))
    return Separability(domains, confusion_DD, _name(encoder))


def draw_separability(found: Separability, path: str | Path) -> Path:
    """Draw which domain the texts of each were taken for.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    require("eval", "matplotlib")
    from matplotlib.colors import LinearSegmentedColormap

    share_DD = found.confusion_DD / found.confusion_DD.sum(axis=1, keepdims=True)
    size = 1.8 + 0.52 * len(found.domains)
    with figure(size + 0.3, size) as (drawn, axes):
        # From white on, not the house's colours for heat maps: most cells are empty and should look it.
        axes.imshow(share_DD, cmap=LinearSegmentedColormap.from_list("share", ["white", COLOURS[0]]), vmin=0, vmax=1)
        for row, shares in enumerate(share_DD):
            for column, share in enumerate(shares):
                if share:
                    colour = "white" if share > 0.5 else "black"
                    axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour)
        axes.set_xticks(range(len(found.domains)), found.domains, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(found.domains)), found.domains)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)
        axes.spines[:].set_color("lightgrey")
        axes.set_xlabel("domain with the nearest centroid")
        axes.set_ylabel("domain of the text")
        mean = np.mean(list(found.accuracy.values()))
        axes.set_title(f"Percent of texts; {found.encoder}, {mean:.0%} right")
        return save(drawn, path)


def _spread(texts: Sequence[str], count: int) -> list[str]:
    """Take texts at even distances; an encoder reads no more of one than its beginning."""
    places = np.linspace(0, len(texts) - 1, min(count, len(texts))).round().astype(int)
    return [texts[place][:_LONGEST] for place in places]


def _embed(encode: Encode, texts: Sequence[str]) -> np.ndarray:
    parts = [np.asarray(encode(texts[at : at + _AT_ONCE]), np.float32) for at in range(0, len(texts), _AT_ONCE)]
    return _unit(np.concatenate(parts))


def _unit(embedding_NW: np.ndarray) -> np.ndarray:
    norm_N1 = np.linalg.norm(embedding_NW, axis=-1, keepdims=True)
    return embedding_NW / np.where(norm_N1 > 0, norm_N1, 1)


def _tfidf(texts: Sequence[str]) -> Encode:
    require("routing", "sklearn")
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(max_features=_WORDS, sublinear_tf=True).fit(texts)
    return lambda texts: words.transform(texts).toarray()


def _name(encoder: Any) -> str:
    if encoder is None:
        return TFIDF
    # Many encoders lie in a folder that is called "model", which alone would be read as something else.
    return f"encoder {Path(encoder).name if isinstance(encoder, (str, Path)) else type(encoder).__name__!r}"
