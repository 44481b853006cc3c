"""Just enough of R's data formats to read character vectors: XDR serialisation and lazy-load databases.

R is not needed. A package's data lie in two files: ``Rdata.rdb`` holds the packed objects one after the other,
``Rdata.rdx`` says where each begins. See "Serialization Formats" in the manual *R Internals*.
"""

import bz2
import gzip
import lzma
import struct
import zlib
from typing import Any

from flexolmo_hf.errors import DamagedFileError

_SYMBOL, _PAIRLIST, _CHARS, _LOGICALS, _INTEGERS, _REALS, _STRINGS, _LIST = 1, 2, 9, 10, 13, 14, 16, 19
_NIL, _REFERENCE = 254, 255
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


def read_database(index: bytes, data: bytes) -> dict[str, Any]:
    """Read every object of a lazy-load database.

    Args:
        index: Content of ``Rdata.rdx``.
        data: Content of ``Rdata.rdb``.

    Returns:
        The objects by name; vectors and lists as Python lists, without their attributes.

    Raises:
        DamagedFileError: If the bytes are not what they should be.
    """
    try:
        variables = read_xdr(gzip.decompress(index), named=True)["variables"]
        return {name: read_xdr(_unpacked(data[at : at + size])) for name, (at, size) in variables.items()}
    except (KeyError, IndexError, TypeError, struct.error, zlib.error, lzma.LZMAError, OSError, EOFError) as error:
        raise DamagedFileError("Rdata.rdb", f"it is no lazy-load database ({type(error).__name__})") from None


def _unpacked(packed: bytes) -> bytes:
    # Four bytes of length, then a letter for the method; without one, it is zlib.
    method, body = packed[4:5], packed[5:]
    if method == b"2":
        return bz2.decompress(body)
    if method == b"Z":
        return lzma.decompress(body, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}])
    return zlib.decompress(packed[4:])


def read_xdr(data: bytes, *, named: bool = False) -> Any:
    r"""Read one object in R's binary XDR format.

    Args:
        data: The bytes, from the ``X\n`` at their beginning on.
        named: Make dicts of lists that have names.

    Raises:
        DamagedFileError: If it is another format or holds an object of another type.
    """
    if data[:2] != b"X\n":
        raise DamagedFileError("R object", "it is not in R's XDR format")
    return _Reader(data, named).read_file()


class _Reader:
    """Walks through the bytes; symbols are numbered as they come, for later references."""

    def __init__(self, data: bytes, named: bool):
        self.data, self.named = data, named
        self.at = 2
        self.symbols: list[Any] = []

    def read_file(self) -> Any:
        version, _writer, _oldest_reader = self._integers(3)
        if version >= 3:
            self._bytes(self._integers(1)[0])  # the name of the native encoding
        return self._object()

    def _bytes(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        if count < 0 or len(found) < count:
            raise DamagedFileError("R object", "it is truncated")
        self.at += count
        return found

    def _integers(self, count: int) -> tuple[int, ...]:
        return struct.unpack(f">{count}i", self._bytes(4 * count))

    def _object(self) -> Any:
        [flags] = self._integers(1)
        kind = flags & 0xFF
        if kind == _NIL:
            return None
        if kind == _REFERENCE:
            return self._symbol(flags >> 8 or self._integers(1)[0])
        if kind == _SYMBOL:
            self.symbols.append(self._object())
            return self.symbols[-1]
        if kind == _PAIRLIST:
            return self._pairs(flags)
        return self._vector(kind, flags)

    def _symbol(self, number: int) -> Any:
        if not 0 < number <= len(self.symbols):
            raise DamagedFileError("R object", f"it refers to symbol {number} of {len(self.symbols)}")
        return self.symbols[number - 1]

    def _pairs(self, flags: int) -> dict[Any, Any]:
        pairs = {}
        while flags & 0xFF != _NIL:
            if flags & _HAS_ATTRIBUTES:
                self._object()
            tag = self._object() if flags & _HAS_TAG else None
            pairs[tag] = self._object()
            [flags] = self._integers(1)
        return pairs

    def _vector(self, kind: int, flags: int) -> Any:
        [length] = self._integers(1)
        if kind == _CHARS:
            # A length of -1 is R's missing string.
            return None if length < 0 else self._bytes(length).decode("utf8", "replace")
        values: list[Any]
        if kind in (_STRINGS, _LIST):
            values = [self._object() for _ in range(length)]
        elif kind in (_LOGICALS, _INTEGERS):
            values = list(self._integers(length))
        elif kind == _REALS:
            values = list(struct.unpack(f">{length}d", self._bytes(8 * length)))
        else:
            raise DamagedFileError("R object", f"it holds an object of R's type {kind}, which is not read here")
        attributes = self._object() if flags & _HAS_ATTRIBUTES else {}
        if self.named and kind == _LIST and "names" in attributes:
            return dict(zip(attributes["names"], values, strict=True))
        return values
