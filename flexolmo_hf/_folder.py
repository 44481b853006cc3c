"""Output folders that appear whole or not at all."""

import contextlib
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

from flexolmo_hf.errors import NoSpaceError, OutputFolderNotEmptyError, OutputPlaceError


def refuse_nonempty(folder: str | os.PathLike) -> Path:
    """Return the path if a folder can be made there: nothing is there yet, or an empty folder.

    Raises:
        OutputFolderNotEmptyError: If it is a file or holds anything.
        OutputPlaceError: If it is a link or the working directory, or lies below a file.
    """
    path = Path(folder)
    if path.is_symlink():
        raise OutputPlaceError(path.name, "it is a link, and would be replaced")
    if path.name in ("", "..") or (path.exists() and path.samefile(Path.cwd())):
        raise OutputPlaceError(str(path.name or "."), "it is a folder in use")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputFolderNotEmptyError(path.name)
    for above in path.parents:
        if above.exists():
            if not above.is_dir():
                raise OutputPlaceError(above.name, "it is a file, not a folder")
            break
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
        OutputFolderNotEmptyError, OutputPlaceError: If the final place is taken or cannot be one.
        NoSpaceError: If the disk is too small, before or while writing.
    """
    final = refuse_nonempty(folder)
    partial = final.parent / f".{final.name}.partial-{uuid.uuid4().hex[:8]}"
    with no_space_named(final, needed_bytes):
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if needed_bytes > free:
            raise NoSpaceError(needed_bytes, free)
        partial.mkdir()
        try:
            yield partial
            if final.exists():
                final.rmdir()
            partial.replace(final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


@contextlib.contextmanager
def no_space_named(final: Path, needed_bytes: int = 0) -> Iterator[None]:
    """Say that the disk is full, where it is, instead of what failed because of it.

    Args:
        final: What is written.
        needed_bytes: How much that needs, if known.

    Raises:
        NoSpaceError: In the place of an error of the block that came from a full disk.
    """
    try:
        yield
    except Exception as error:
        # safetensors reports the operating system's refusal inside its own error, as text.
        full = getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error)
        if isinstance(error, NoSpaceError) or not full:
            raise
        above = next(folder for folder in final.absolute().parents if folder.exists())
        raise NoSpaceError(needed_bytes or None, shutil.disk_usage(above).free) from error
