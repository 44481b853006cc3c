"""Texts that are read more than once without being held in memory."""

import errno
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeAlias

from flexolmo_hf.errors import ConfigurationError, NoSpaceError

Texts: TypeAlias = Iterable[str] | Callable[[], Iterable[str]]
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
    if not callable(texts) and iter(texts) is texts:
        return None
    return lambda: _checked(texts, whose)


def _checked(texts: Texts, whose: str) -> Iterator[str]:
    for index, text in enumerate(texts() if callable(texts) else texts):
        if not isinstance(text, str):
            raise ConfigurationError(
                f"Document {index} of the {whose} texts is of type {type(text).__name__!r}.",
                "Give documents as strings, such as dataset['text'].",
            )
        yield text
