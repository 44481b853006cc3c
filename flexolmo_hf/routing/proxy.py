"""Proxy data: public documents that look like an owner's private ones (arXiv 2507.07024, on router tuning).

Owners name them so that a merged model's router can be tuned without anyone seeing private text.

Shapes: N chosen documents, M candidates, W width of the encoder.
"""

import os
from typing import Any

from transformers.utils import logging

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError, TooFewDocumentsError
from flexolmo_hf.routing.candidates import Candidates, best_of
from flexolmo_hf.routing.classifier import LogisticClassifier, ProxyClassifier
from flexolmo_hf.routing.diversity import pick_diverse
from flexolmo_hf.routing.embedded import Batch, Embedder, Tally
from flexolmo_hf.routing.encoders import open_encoder
from flexolmo_hf.routing.finetuning import FineTunedClassifier
from flexolmo_hf.routing.leaks import LeakLimits, NearestPrivate
from flexolmo_hf.routing.learning import learn
from flexolmo_hf.routing.passes import Passes, Texts, private_passes, public_passes
from flexolmo_hf.routing.proxy_selection import ProxySelection
from flexolmo_hf.routing.proxy_settings import FEWEST, ProxySettings
from flexolmo_hf.routing.sampling import sample_texts

logger = logging.get_logger(__name__)


def select_proxy(
    public_texts: Texts,
    private_texts: Texts,
    *,
    n: int,
    encoder: Any,
    classifier: str | ProxyClassifier = "logistic",
    diverse: bool = False,
    settings: ProxySettings | None = None,
) -> ProxySelection:
    """Choose public documents that look like private ones, without near-duplicates of them.

    A classifier learns from a random sample to tell the private documents from the public ones; then all public
    documents are scored, and the best of them compared with every private document. Only public text is given back;
    nothing private is written or logged.

    Args:
        public_texts: An iterable, or a function that returns a new one at each call. It is read twice and never held in
            memory. An iterator that can be read only once is first copied to a temporary file.
        private_texts: The same. An iterator that can be read only once is held in memory, and refused if it has more
            documents than `settings.train_private`, because private text is not copied to a disk.
        n: How many documents to choose.
        encoder: The folder or Hub repository of a sentence-transformers model, such a model, or a function from texts
            to an array ``(B, W)``.
        classifier: ``"logistic"``, a regression on the embeddings; ``"finetune"``, which fine-tunes the encoder, given
            by folder or repository; or an object such as `FineTunedClassifier`.
        diverse: Choose documents that differ from each other as well; takes ``8 * candidates * n ** 2`` bytes.
        settings: Everything else.

    Returns:
        The documents, the best first, and reports. They are fewer than `n` if too many candidates are near-duplicates,
        which is warned of.

    Raises:
        TooFewDocumentsError: If fewer than 20 documents of one kind, or fewer than `n` public ones, can be used.
        ConfigurationError: If a setting makes no sense, the texts are not strings, the encoder returns no matrix, or
            the corpus is another at the second reading.
        CheckpointNotFoundError, MissingExtraError: If the encoder cannot be had, or scikit-learn is missing.
        NoSpaceError: If there is no room for the copy of a public iterator.
    """
    settings = settings or ProxySettings()
    require("routing", "sklearn")
    if n < 1:
        raise ConfigurationError(f"n is {n}.", "At least 1 document is chosen.")
    judge = _classifier(classifier, encoder)
    embed = Embedder(open_encoder(encoder), settings.batch_size)
    private = private_passes(private_texts, at_most=settings.train_private)
    with public_passes(public_texts) as public:
        private_sample, private_tally = _sample(private, embed, "private", settings.train_private, settings.seed)
        public_sample, first = _sample(public, embed, "public", settings.train_public, settings.seed, needed=n)
        report = learn(judge, public_sample, private_sample, held_out=settings.held_out, seed=settings.seed)
        candidates, public_tally = _candidates(public, embed, judge, n, settings.candidates)
    _same("public", first, public_tally)
    if len(candidates) < n:
        raise TooFewDocumentsError(
            "public", len(candidates), n, public_tally.empty, public_tally.unusable, candidates.repeated
        )
    limits = _limits(candidates, private, embed, private_sample, private_tally, settings)
    chosen = _choose(candidates, limits.allowed(), n, settings.relevance if diverse else None)
    if len(chosen) < n:
        logger.warning(
            "%d of %d documents were chosen: the other candidates are near-duplicates of private documents. "
            "Raise `candidates` of ProxySettings, which is %d.",
            len(chosen),
            n,
            settings.candidates,
        )
    return ProxySelection(
        texts=[candidates.documents.texts[i] for i in chosen],
        indices=[candidates.documents.indices[i] for i in chosen],
        scores=candidates.probability_M[chosen].tolist(),
        classifier=report,
        leaks=limits.report(chosen),
        public=public_tally,
        private=private_tally,
        repeated=candidates.repeated,
        settings={"n": n, "classifier": type(judge).__name__, "diverse": diverse, **vars(settings)},
    )


def _classifier(kind: str | ProxyClassifier, encoder: Any) -> ProxyClassifier:
    if not isinstance(kind, str):
        return kind
    if kind == "logistic":
        return LogisticClassifier()
    if kind != "finetune":
        raise ConfigurationError(f"classifier is {kind!r}.", "It is 'logistic', 'finetune' or a classifier.")
    if not isinstance(encoder, (str, os.PathLike)):
        raise ConfigurationError(
            "classifier='finetune' fine-tunes the encoder, and it was not given by folder or repository.",
            "Name the model to fine-tune: classifier=FineTunedClassifier(FOLDER).",
        )
    return FineTunedClassifier(encoder)


def _sample(
    passes: Passes, embed: Embedder, whose: str, size: int, seed: int, *, needed: int = FEWEST
) -> tuple[Batch, Tally]:
    tally = Tally()
    texts, _ = sample_texts((text for _, text in tally.nonempty(passes())), sample=size, seed=seed)
    if (found := tally.read - tally.empty) < max(needed, FEWEST):
        raise TooFewDocumentsError(whose, found, max(needed, FEWEST), tally.empty, 0)
    batch = Batch.joined(embed(enumerate(texts), tally))
    if len(batch) < FEWEST:
        raise TooFewDocumentsError(whose, len(batch), FEWEST, tally.empty, tally.unusable)
    return batch, tally


def _candidates(
    public: Passes, embed: Embedder, judge: ProxyClassifier, n: int, factor: int
) -> tuple[Candidates, Tally]:
    tally = Tally()
    return best_of(embed(tally.nonempty(public()), tally), judge, n * factor), tally


def _limits(
    candidates: Candidates,
    private: Passes,
    embed: Embedder,
    sample: Batch,
    first: Tally,
    settings: ProxySettings,
) -> LeakLimits:
    nearness, tally = NearestPrivate(candidates.documents), Tally()
    # Words are compared before embedding: what has no usable embedding may be copied word for word all the same.
    documents = nearness.comparing_words(tally.nonempty(private()))
    if first.read <= settings.train_private:
        nearness.compare_embeddings(sample.unit_BW)
        for _ in documents:
            pass
    else:
        for batch in embed(documents, tally):
            nearness.compare_embeddings(batch.unit_BW)
        first.unusable = tally.unusable
    _same("private", first, tally)
    return LeakLimits(nearness, cosine=settings.cosine_limit, overlap=settings.overlap_limit)


def _choose(candidates: Candidates, allowed: list[int], n: int, relevance: float | None) -> list[int]:
    if relevance is None:
        # Candidates come sorted.
        return allowed[:n]
    unit_MW = candidates.documents.unit_BW[allowed]
    picked = pick_diverse(candidates.probability_M[allowed], unit_MW, min(n, len(allowed)), weight=relevance)
    return [allowed[position] for position in picked]


def _same(whose: str, first: Tally, second: Tally) -> None:
    if first.read != second.read:
        raise ConfigurationError(
            f"The {whose} texts were {first.read} documents at the first reading and {second.read} at the second.",
            "A function that is given returns a new iterator over the same documents at each call.",
        )
