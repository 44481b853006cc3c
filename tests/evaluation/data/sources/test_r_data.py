import bz2
import gzip
import lzma
import struct
import zlib

import pytest

from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.evaluation.data.sources.r_data import read_database, read_xdr

NIL = struct.pack(">i", 254)


def chars(text):
    """A CHARSXP; None is R's missing string."""
    if text is None:
        return struct.pack(">ii", 9, -1)
    return struct.pack(">ii", 9, len(text.encode())) + text.encode()


def symbol(name):
    return struct.pack(">i", 1) + chars(name)


def vector(kind, items, attributes=b""):
    return struct.pack(">ii", kind | (0x200 if attributes else 0), len(items)) + b"".join(items) + attributes


def strings(*texts, attributes=b""):
    return vector(16, [chars(text) for text in texts], attributes)


def integers(*values):
    return vector(13, [struct.pack(">i", value) for value in values])


def pairs(*items):
    """A pairlist of tags and values."""
    return b"".join(struct.pack(">i", 2 | 0x400) + tag + value for tag, value in items) + NIL


def file(body, version=2):
    encoding = struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    return b"X\n" + struct.pack(">iii", version, 0x40200, 0x20300) + encoding + body


@pytest.mark.parametrize("version", [2, 3])
def test_character_vector_comes_back(version):
    assert read_xdr(file(strings("Emma", "", "é", None), version)) == ["Emma", "", "é", None]


def test_numbers_and_nested_lists_come_back():
    reals = vector(14, [struct.pack(">d", 1.5)])
    logicals = vector(10, [struct.pack(">i", 1)])

    assert read_xdr(file(vector(19, [integers(3, -1), reals, logicals, NIL]))) == [[3, -1], [1.5], [1], None]


def test_attributes_are_passed_over_and_what_follows_is_read():
    first = strings("a", attributes=pairs((symbol("class"), strings("character"))))

    assert read_xdr(file(vector(19, [first, strings("b")]))) == [["a"], ["b"]]


def reference(number):
    return struct.pack(">i", number << 8 | 255)


def test_symbol_that_came_before_is_found_again():
    # Attributes follow the values, so the inner list's are the first to be read.
    inner = vector(19, [integers(2)], pairs((symbol("names"), strings("y"))))
    outer = vector(19, [inner, integers(1)], pairs((reference(1), strings("z", "x"))))

    assert read_xdr(file(outer), named=True) == {"z": {"y": [2]}, "x": [1]}


def test_symbol_that_never_came_is_refused():
    with pytest.raises(DamagedFileError, match="symbol 1 of 0"):
        read_xdr(file(reference(1)))


@pytest.mark.parametrize(
    "pack",
    [
        zlib.compress,
        lambda raw: b"2" + bz2.compress(raw),
        lambda raw: b"Z" + lzma.compress(raw, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 6}]),
    ],
    ids=["zlib", "bzip2", "xz"],
)
def test_database_gives_each_object_under_its_name(pack):
    objects = {name: file(strings(f"text of {name}")) for name in ("emma", "persuasion")}
    data, places = b"", {}
    for name, raw in objects.items():
        packed = struct.pack(">i", len(raw)) + pack(raw)
        places[name] = integers(len(data), len(packed))
        data += packed
    variables = vector(19, list(places.values()), pairs((symbol("names"), strings(*places))))
    index = gzip.compress(file(vector(19, [variables], pairs((symbol("names"), strings("variables"))))))

    assert read_database(index, data) == {"emma": ["text of emma"], "persuasion": ["text of persuasion"]}


@pytest.mark.parametrize(
    "damaged",
    [b"RDX3\n", file(strings("Emma"))[:-2], file(struct.pack(">ii", 3, 0)), file(integers(1))[:-1]],
    ids=["not XDR", "truncated text", "a closure", "truncated number"],
)
def test_damaged_object_is_refused(damaged):
    with pytest.raises(DamagedFileError):
        read_xdr(damaged)


def test_damaged_database_is_refused():
    with pytest.raises(DamagedFileError, match="no lazy-load database"):
        read_database(b"something", b"else")
