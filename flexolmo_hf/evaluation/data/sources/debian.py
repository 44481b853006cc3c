"""Reading files out of a Debian package: an ``ar`` archive around a tarball. No dpkg is needed."""

import io
import tarfile
from pathlib import Path

from flexolmo_hf.errors import DamagedFileError

_MAGIC = b"!<arch>\n"
_HEADER = 60


def read_members(package: Path, *names: str) -> list[bytes]:
    """Read files of a Debian package.

    Args:
        package: The ``.deb`` file.
        names: Paths in the installed system, without the leading ``/``.

    Returns:
        Their contents, in the order of `names`.

    Raises:
        DamagedFileError: If it is no Debian package, or lacks one of the files.
    """
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_tarball(package)), mode="r:*") as tarball:
            return [_content(tarball, name) for name in names]
    except (tarfile.TarError, KeyError, EOFError):
        raise DamagedFileError(package.name, "it does not hold the expected files") from None


def _data_tarball(package: Path) -> bytes:
    raw = package.read_bytes()
    at = len(_MAGIC)
    if raw[:at] != _MAGIC:
        raise DamagedFileError(package.name, "it is no Debian package")
    while at + _HEADER <= len(raw):
        # The header: name in 16 bytes, ..., size in 10 as decimal digits, two bytes of end.
        name, size = raw[at : at + 16].decode("latin1").strip(" /"), raw[at + 48 : at + 58]
        if not size.strip().isdigit():
            break
        begin = at + _HEADER
        if name.startswith("data.tar"):
            return raw[begin : begin + int(size)]
        # Members begin at even places.
        at = begin + int(size) + int(size) % 2
    raise DamagedFileError(package.name, "it has no member data.tar")


def _content(tarball: tarfile.TarFile, name: str) -> bytes:
    file = tarball.extractfile(f"./{name}")
    if file is None:
        raise KeyError(name)
    with file:
        return file.read()
