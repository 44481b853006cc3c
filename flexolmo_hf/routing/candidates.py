"""The best documents of a stream that need not fit into memory.

Shapes: B documents in a batch, M candidates, W width of the encoder.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from flexolmo_hf.routing.classifier import ProxyClassifier, judged, probability
from flexolmo_hf.routing.embedded import Batch, digest


@dataclass(frozen=True)
class Candidates:
    """The best public documents, the best first.

    Attributes:
        documents: The documents with their embeddings.
        probability_M: How probable it is that each is private, says the classifier.
        repeated: Documents left out because the same text was held already.
    """

    documents: Batch
    probability_M: np.ndarray
    repeated: int

    def __len__(self) -> int:
        return len(self.documents)


def best_of(batches: Iterable[Batch], judge: ProxyClassifier, size: int) -> Candidates:
    """Keep the best documents of a stream, each text once.

    Args:
        batches: The stream; of it only `size` documents and a batch are in memory.
        judge: A classifier that has learned.
        size: How many to keep at most.
    """
    heap: list[tuple[float, int, str, np.ndarray]] = []
    held: set[bytes] = set()
    repeated = 0
    for batch in batches:
        scores = judged(judge, batch.texts, batch.unit_BW)
        for score, index, text, unit_W in zip(scores, batch.indices, batch.texts, batch.unit_BW, strict=True):
            # Of equally good documents the earlier is kept; no two indices are equal, so no texts are compared.
            entry = (float(score), -index, text, unit_W)
            full = len(heap) >= size
            if full and entry[:2] < heap[0][:2]:
                continue
            if (key := digest(text)) in held:
                repeated += 1
                continue
            held.add(key)
            if full:
                held.discard(digest(heapq.heappushpop(heap, entry)[2]))
            else:
                heapq.heappush(heap, entry)
    heap.sort(key=lambda entry: entry[:2], reverse=True)
    documents = Batch(
        [-entry[1] for entry in heap],
        [entry[2] for entry in heap],
        np.array([entry[3] for entry in heap], np.float32),
    )
    return Candidates(documents, probability(np.array([entry[0] for entry in heap])), repeated)
