"""How near public documents come to private ones, in meaning and word for word.

A public document that is nearly a private one would tell, by being chosen, that the owner has it.

Shapes: M candidates, W width of the encoder, B private documents in a batch, G word sequences.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from flexolmo_hf._word_runs import run_hashes
from flexolmo_hf.routing.embedded import Batch

#: Words of a sequence; the length that is usual for telling benchmark text in training data.
SEQUENCE = 13

_AT_ONCE = 256
_QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 1.0)


def sequence_hashes(text: str) -> np.ndarray:
    """Hash every sequence of 13 words, as `run_hashes` does.

    A text of fewer words is one sequence.

    Returns:
        The distinct hashes, shape ``(G,)``, uint64, sorted.
    """
    return np.unique(run_hashes(text, SEQUENCE))


class NearestPrivate:
    """Compare candidates with private documents, batch by batch; of these nothing is kept but the nearness.

    Args:
        candidates: The public documents that may be chosen.

    Attributes:
        cosine_M: Cosine of each candidate to its nearest private document so far; -1 before the first.
        private_documents: How many were compared so far.
    """

    def __init__(self, candidates: Batch):
        self._unit_MW = candidates.unit_BW
        self.private_documents = 0
        self.cosine_M = np.full(len(candidates.texts), -1.0, np.float32)
        each = [sequence_hashes(text) for text in candidates.texts]
        self._length_M = np.array([len(hashes) for hashes in each])
        owner_G = np.repeat(np.arange(len(each)), self._length_M)
        hash_G = np.concatenate([*each, np.zeros(0, np.uint64)])
        order = np.argsort(hash_G, kind="stable")
        self._hash_G, self._owner_G = hash_G[order], owner_G[order]
        self._shared_G = np.zeros(len(hash_G), bool)

    def comparing_words(self, documents: Iterable[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Compare the words of private documents while these pass by to whoever reads on."""
        for index, text in documents:
            self.private_documents += 1
            self._mark(sequence_hashes(text))
            yield index, text

    def compare_embeddings(self, unit_BW: np.ndarray) -> None:
        """Compare the embeddings of private documents, which are of length 1."""
        # In parts, so that the products stay small beside the embeddings.
        for start in range(0, len(unit_BW), _AT_ONCE):
            nearest_M = (self._unit_MW @ unit_BW[start : start + _AT_ONCE].T).max(axis=1)
            # Rounding may give 1.0000001.
            np.maximum(self.cosine_M, np.minimum(nearest_M, 1.0), out=self.cosine_M)

    def _mark(self, hashes: np.ndarray) -> None:
        first, last = (np.searchsorted(self._hash_G, hashes, side) for side in ("left", "right"))
        for start, stop in zip(first[last > first], last[last > first], strict=True):
            self._shared_G[start:stop] = True

    @property
    def overlap_M(self) -> np.ndarray:
        """The share of each candidate's word sequences that occur in some private document, 0 to 1."""
        shared_M = np.bincount(self._owner_G, weights=self._shared_G, minlength=len(self._length_M))
        return shared_M / np.maximum(self._length_M, 1)


@dataclass(frozen=True)
class LeakReport:
    """How near the chosen documents are to private ones: counts and quantiles, for the owner.

    The quantiles at 0 and 100 % are those of single documents.

    Attributes:
        private_documents: Private documents compared with.
        candidates: Public documents compared.
        removed: Candidates that were too near to be chosen, by meaning or word for word.
        removed_by_cosine: Those whose nearest private document has a cosine of `cosine_limit` or more.
        removed_by_overlap: Those of whose 13-word sequences a share of `overlap_limit` or more is private.
        cosine_limit: See above.
        overlap_limit: See above.
        distance: Quantiles over the chosen documents of the cosine distance to the nearest private document.
        overlap: Quantiles over the chosen documents of the share of 13-word sequences that are private.
        sharing: Chosen documents that share at least one 13-word sequence with a private one.
    """

    private_documents: int
    candidates: int
    removed: int
    removed_by_cosine: int
    removed_by_overlap: int
    cosine_limit: float
    overlap_limit: float
    distance: dict[str, float]
    overlap: dict[str, float]
    sharing: int


class LeakLimits:
    """Decide which candidates are too near, and report on those that are chosen.

    Args:
        nearness: Candidates, compared with all private documents.
        cosine: From which cosine on a candidate is too near.
        overlap: From which share of word sequences on it is.
    """

    def __init__(self, nearness: NearestPrivate, *, cosine: float, overlap: float):
        self.nearness = nearness
        self.cosine, self.overlap = cosine, overlap
        self._near_M = nearness.cosine_M >= cosine
        self._copied_M = nearness.overlap_M >= overlap

    def allowed(self) -> list[int]:
        """List the candidates that may be chosen."""
        return np.flatnonzero(~(self._near_M | self._copied_M)).tolist()

    def report(self, chosen: Iterable[int]) -> LeakReport:
        """Report on a choice, given by the candidates' positions."""
        positions = list(chosen)
        overlap_N = self.nearness.overlap_M[positions]
        return LeakReport(
            private_documents=self.nearness.private_documents,
            candidates=len(self._near_M),
            removed=int((self._near_M | self._copied_M).sum()),
            removed_by_cosine=int(self._near_M.sum()),
            removed_by_overlap=int(self._copied_M.sum()),
            cosine_limit=self.cosine,
            overlap_limit=self.overlap,
            distance=_quantiles(1.0 - self.nearness.cosine_M[positions].astype(np.float64)),
            overlap=_quantiles(overlap_N),
            sharing=int((overlap_N > 0).sum()),
        )


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    return {f"{share:.0%}": float(np.quantile(values, share)) for share in _QUANTILES}
