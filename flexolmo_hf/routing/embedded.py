"""Documents with their embeddings, batch by batch, and counts of those that cannot be used.

Shapes: B documents in a batch, W width of the encoder.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.routing.encoders import Encode


@dataclass
class Tally:
    """How many documents a pass has read, and how many of them it could not use.

    Attributes:
        read: All documents.
        empty: Documents of nothing but white space.
        unusable: Documents whose embedding holds NaN or infinity, or is zero.
    """

    read: int = 0
    empty: int = 0
    unusable: int = 0

    def nonempty(self, texts: Iterable[str]) -> Iterator[tuple[int, str]]:
        """Count documents and pass on those that hold something, with their positions."""
        for index, text in enumerate(texts):
            self.read += 1
            if text.strip():
                yield index, text
            else:
                self.empty += 1


@dataclass(frozen=True)
class Batch:
    """Usable documents with their embeddings, of length 1.

    Attributes:
        indices: Their positions in the corpus.
        texts: The documents.
        unit_BW: Float32.
    """

    indices: list[int]
    texts: list[str]
    unit_BW: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    @staticmethod
    def joined(batches: Iterable["Batch"]) -> "Batch":
        """Put batches one after the other."""
        parts = list(batches)
        return Batch(
            [index for part in parts for index in part.indices],
            [text for part in parts for text in part.texts],
            np.concatenate([part.unit_BW for part in parts]) if parts else np.zeros((0, 0), np.float32),
        )

    def chosen(self, positions: Iterable[int]) -> "Batch":
        """Take some of the documents, in the order given."""
        order = list(positions)
        return Batch([self.indices[i] for i in order], [self.texts[i] for i in order], self.unit_BW[order])


class Embedder:
    """Embed documents batch by batch, and leave out those without a usable embedding.

    Args:
        encode: The encoder: ``B`` texts to an array ``(B, W)``.
        batch_size: Documents given to it at once.
    """

    def __init__(self, encode: Encode, batch_size: int):
        self.encode, self.batch_size, self.width = encode, batch_size, 0

    def __call__(self, documents: Iterable[tuple[int, str]], tally: Tally) -> Iterator[Batch]:
        """Embed documents in their order.

        Args:
            documents: Positions and texts.
            tally: Where those that cannot be used are counted.

        Raises:
            ConfigurationError: If what the encoder returns is no matrix with a row for each text.
        """
        rest = iter(documents)
        while part := list(islice(rest, self.batch_size)):
            embeddings_BW = self._matrix([text for _, text in part])
            length_B = np.linalg.norm(embeddings_BW.astype(np.float64), axis=1)
            usable_B = np.isfinite(length_B) & (length_B > 0)
            tally.unusable += int((~usable_B).sum())
            if usable_B.any():
                kept = [document for document, usable in zip(part, usable_B, strict=True) if usable]
                unit_BW = (embeddings_BW[usable_B] / length_B[usable_B, None]).astype(np.float32)
                yield Batch([index for index, _ in kept], [text for _, text in kept], unit_BW)

    def _matrix(self, texts: list[str]) -> np.ndarray:
        found = self.encode(texts)
        if isinstance(found, torch.Tensor):
            found = found.detach().float().cpu()
        try:
            matrix = np.asarray(found, dtype=np.float32)
        except (TypeError, ValueError):
            # The cause would quote what is no number, which may be the text itself.
            raise ConfigurationError(
                f"The encoder returned a {type(found).__name__} that is no array of numbers.",
                "It returns one row for each text, all of one width, as sentence-transformers do.",
            ) from None
        width = self.width or (matrix.shape[-1] if matrix.ndim else 0)
        if matrix.shape != (len(texts), width) or not width:
            raise ConfigurationError(
                f"For {len(texts)} texts the encoder returned an array of shape {matrix.shape}.",
                f"It returns one row for each text, of {self.width or 'one'} width, as sentence-transformers do.",
            )
        self.width = width
        return matrix


def digest(text: str) -> bytes:
    """Tell equal texts by few bytes."""
    return hashlib.blake2b(text.encode("utf8", "surrogatepass"), digest_size=16).digest()
