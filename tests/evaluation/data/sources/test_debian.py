import io
import tarfile

import pytest

from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.evaluation.data.sources.debian import read_members


def tarball(files, compression):
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return raw.getvalue()


def package(path, *members):
    """An ar archive, as in ar(5): members begin at even places."""
    raw = b"!<arch>\n"
    for name, content in members:
        raw += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        raw += content + b"\n" * (len(content) % 2)
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("compression", ["xz", "gz"])
@pytest.mark.parametrize("control", [b"even", b"odd"], ids=["even", "odd"])
def test_files_come_out_in_the_order_asked_for(tmp_path, compression, control):
    data = tarball({"usr/a": b"A", "usr/b": b"B" * 5000}, compression)
    deb = package(
        tmp_path / "x.deb", ("debian-binary", b"2.0\n"), ("control.tar.xz", control), (f"data.tar.{compression}", data)
    )

    assert read_members(deb, "usr/b", "usr/a") == [b"B" * 5000, b"A"]


def test_package_without_the_file_is_refused(tmp_path):
    deb = package(tmp_path / "x.deb", ("data.tar.xz", tarball({"usr/a": b"A"}, "xz")))

    with pytest.raises(DamagedFileError, match="x.deb"):
        read_members(deb, "usr/b")


@pytest.mark.parametrize("content", [b"no archive", b"!<arch>\n", b"!<arch>\n" + b"x" * 60])
def test_something_else_is_refused(tmp_path, content):
    (tmp_path / "x.deb").write_bytes(content)

    with pytest.raises(DamagedFileError):
        read_members(tmp_path / "x.deb", "usr/a")


def test_damaged_tarball_is_refused(tmp_path):
    data = tarball({"usr/a": b"A" * 9000}, "xz")

    with pytest.raises(DamagedFileError):
        read_members(package(tmp_path / "x.deb", ("data.tar.xz", data[: len(data) // 2])), "usr/a")
