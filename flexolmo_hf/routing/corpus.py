"""Corpora that are larger than memory: read twice, sampled without bias, embedded batch by batch.

Shapes: B documents in a batch, W width of the encoder.
"""

import errno
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TypeAlias

import numpy as np

from flexolmo_hf.errors import ConfigurationError, NoSpaceError

Texts: TypeAlias = Iterable[str] | Callable[[], Iterable[str]]
Encode: TypeAlias = Callable[[list[str]], np.ndarray]
Passes: TypeAlias = Callable[[], Iterator[str]]


@contextmanager
def public_passes(texts: Texts) -> Iterator[Passes]:
    """Give a function that starts reading public texts anew each time it is called.

    What can be read only once is copied to a temporary file without a name, which is gone at the end whatever happens.
    A sample from the beginning of such a stream would need no copy, but corpora are sorted by source and date.

    Raises:
        ConfigurationError: If the texts are one string.
        NoSpaceError: If the disk is too small for the copy.
    """
    if (again := _readable_again(texts, "public")) is not None:
        yield again
        return
    with tempfile.TemporaryFile("w+", encoding="ascii") as copy:
        try:
            for text in _checked(texts, "public"):
                copy.write(json.dumps(text) + "\n")
            copy.flush()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise NoSpaceError(None, shutil.disk_usage(tempfile.gettempdir()).free) from error

        def reread() -> Iterator[str]:
            copy.seek(0)
            return map(json.loads, copy)

        yield reread


def private_passes(texts: Texts, *, at_most: int) -> Passes:
    """Give a function that starts reading private texts anew each time it is called.

    Private text is never copied to a disk: what can be read only once is held in memory, if it is not too much.

    Raises:
        ConfigurationError: If the texts are one string, or a stream of more than `at_most` documents.
    """
    if (again := _readable_again(texts, "private")) is not None:
        return again
    held = list(islice(_checked(texts, "private"), at_most + 1))
    if len(held) > at_most:
        raise ConfigurationError(
            f"The private texts come from an iterator that can be read once and has more than {at_most} documents; "
            "they are needed twice, and are not copied to a disk.",
            "Give a list, a dataset's column, or a function that returns a new iterator each time it is called.",
        )
    return lambda: iter(held)


def _readable_again(texts: Texts, whose: str) -> Passes | None:
    if isinstance(texts, (str, bytes)):
        raise ConfigurationError(f"The {whose} texts are one string.", "Give a list of documents.")
    if callable(texts):
        return lambda: _checked(texts(), whose)
    return None if iter(texts) is texts else lambda: _checked(texts, whose)


def _checked(texts: Iterable[str], whose: str) -> Iterator[str]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ConfigurationError(
                f"Document {index} of the {whose} texts is of type {type(text).__name__!r}.",
                "Give documents as strings, such as dataset['text'].",
            )
        yield text


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
        matrix = np.asarray(self.encode(texts), dtype=np.float32)
        width = self.width or (matrix.shape[-1] if matrix.ndim else 0)
        if matrix.shape != (len(texts), width) or not width:
            raise ConfigurationError(
                f"For {len(texts)} texts the encoder returned an array of shape {matrix.shape}.",
                f"It returns one row for each text, of {self.width or 'one'} width, as sentence-transformers do.",
            )
        self.width = width
        return matrix


def sample(documents: Iterable[tuple[int, str]], size: int, seed: str) -> list[tuple[int, str]]:
    """Draw documents from a stream so that each has the same chance, and return them in the order of the stream.

    Args:
        documents: Positions and texts, any number; at most `size` are held.
        size: How many to draw; all if there are fewer.
        seed: Decides which.
    """
    chance = random.Random(seed)
    held: list[tuple[int, str]] = []
    for seen, document in enumerate(documents):
        if seen < size:
            held.append(document)
        elif (place := chance.randrange(seen + 1)) < size:
            held[place] = document
    return sorted(held)


def digest(text: str) -> bytes:
    """Tell equal texts by few bytes."""
    return hashlib.blake2b(text.encode("utf8", "surrogatepass"), digest_size=16).digest()
