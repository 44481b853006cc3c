"""Proxy documents: public ones that look like each owner's."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from transformers import AutoTokenizer, Olmo2ForCausalLM

from benchmarks.flexmix_mini.place import Place
from benchmarks.flexmix_mini.training import PUBLIC, public_texts
from flexolmo_hf import ProxySettings, select_proxy
from flexolmo_hf.routing.hidden_states import HiddenStates

# Characters of a passage, and how many of its tokens are embedded.
_PASSAGE, _TOKENS = 1_500, 128


class Remembering:
    """An encoder that embeds a text once: seven owners ask for the same public documents.

    Hidden states of one model have most of their direction in common. The public mean is taken off, so that a small
    angle means that two texts are alike.
    """

    def __init__(self, encode: Any, public_texts: Sequence[str]):
        self._encode = encode
        self._known: dict[bytes, np.ndarray] = {}
        self._mean = np.zeros(())
        # Texts of one length share a batch: padding would be most of the work.
        texts = sorted(public_texts, key=len)
        self._mean = np.concatenate([self(texts[start : start + 32]) for start in range(0, len(texts), 32)]).mean(0)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts ``(B, W)``."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        new = [text for key, text in zip(keys, texts, strict=True) if key not in self._known]
        if new:
            embedded = np.asarray(self._encode(new))
            self._known |= {
                hashlib.sha256(text.encode()).digest(): row for text, row in zip(new, embedded, strict=True)
            }
        return np.stack([self._known[key] for key in keys]) - self._mean


def proxies(place: Place) -> dict[str, Any]:
    """Choose each owner's proxies with a classifier on the anchor's hidden states; only public text comes out."""
    sizes = place.settings
    anchor = Olmo2ForCausalLM.from_pretrained(place.model(PUBLIC))
    reads = AutoTokenizer.from_pretrained(place.tokenizer)
    candidates = list(_passages(public_texts(place)))
    encode = Remembering(HiddenStates(anchor, reads, max_length=_TOKENS), candidates)
    # Hidden states of a small model are near each other wherever the texts are of one kind; copies are still told by
    # the word sequences that they share.
    settings = ProxySettings(cosine_limit=0.995)
    found = {}
    for owner in sizes.owners:
        private = list(_passages(place.corpus.documents(owner, "train")))
        chosen = select_proxy(candidates, private, n=sizes.proxy_bytes // _PASSAGE, encoder=encode, settings=settings)
        of_domain = set(_passages(place.corpus.documents(owner, "web")))
        found[owner] = {
            "texts": chosen.texts,
            "accuracy": chosen.classifier.accuracy,
            "of the domain": sum(text in of_domain for text in chosen.texts) / len(chosen.texts),
        }
    return found


def _passages(texts: Iterable[str]) -> Iterator[str]:
    # Domains' documents are of very different lengths, and encoders read the beginning only.
    return (text[start : start + _PASSAGE] for text in texts for start in range(0, len(text), _PASSAGE))
