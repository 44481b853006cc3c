"""Output folders that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from flexolmo_hf.errors import NoSpaceError, OutputFolderNotEmptyError


def refuse_nonempty(folder: str | os.PathLike) -> Path:
    """Return the path if nothing is there yet, or an empty folder.

    Raises:
        OutputFolderNotEmptyError: If it is a file or holds anything.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputFolderNotEmptyError(path.name)
    return path


@contextlib.contextmanager
def new_folder(folder: str | os.PathLike, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Write into a folder that takes its final name only when the block has ended well.

    What is written stands beside the final place under a hidden name; on an error it is removed, and a process that is
    killed leaves nothing under the final name.

    Args:
        folder: The final place; must not exist or be an empty folder.
        needed_bytes: Refuse at once if the disk has less free than this.

    Yields:
        The folder to write into.

    Raises:
        OutputFolderNotEmptyError: If the final place is taken.
        NoSpaceError: If the disk is too small, before or while writing.
    """
    final = refuse_nonempty(folder)
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if needed_bytes > free:
        raise NoSpaceError(needed_bytes, free)
    partial = final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir()
    try:
        yield partial
        if final.exists():
            final.rmdir()
        partial.replace(final)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            raise NoSpaceError(needed_bytes or None, shutil.disk_usage(final.parent).free) from error
        raise


def _is_disk_full(error: BaseException) -> bool:
    # safetensors reports the operating system's refusal inside its own error, as text.
    number = getattr(error, "errno", None)
    return number == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
