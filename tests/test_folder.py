"""Output folders appear whole or not at all."""

import errno
from pathlib import Path

import pytest

from flexolmo_hf import _folder as folders
from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.errors import FlexOlmoError, NoSpaceError, OutputFolderNotEmptyError
from tests.composition.conftest import FULL, disk_with, tree


def test_what_was_written_stands_under_the_final_name_and_nowhere_else(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("content")

    assert set(tree(tmp_path)) == {Path("out"), Path("out/file")}


def test_nothing_stands_under_the_final_name_while_writing(tmp_path):
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
        assert not (tmp_path / "out").exists()
        assert partial.name.startswith(".")


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("content")

    assert set(tree(tmp_path)) == {Path("out"), Path("out/file")}


def test_folders_above_are_made(tmp_path):
    with new_folder(str(tmp_path / "a" / "b" / "out")) as partial:
        (partial / "file").write_text("content")

    assert (tmp_path / "a" / "b" / "out" / "file").read_text() == "content"


def test_a_relative_name_is_taken_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with new_folder("out") as partial:
        (partial / "file").write_text("content")

    assert set(tree(tmp_path)) == {Path("out"), Path("out/file")}


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1), OSError(errno.EACCES, "no")]
)
def test_an_error_passes_through_and_leaves_nothing(tmp_path, error):
    with pytest.raises(type(error)) as caught, new_folder(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").write_text("content")
        raise error

    assert caught.value is error
    assert tree(tmp_path) == {}


def test_an_error_leaves_an_empty_folder_as_it_was(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "out"):
        raise RuntimeError("boom")

    assert set(tree(tmp_path)) == {Path("out")}


def test_a_folder_that_fills_up_meanwhile_is_not_overwritten(tmp_path):
    with pytest.raises(OSError), new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("ours")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "file").write_text("theirs")

    assert set(tree(tmp_path)) == {Path("out"), Path("out/file")}
    assert (tmp_path / "out" / "file").read_text() == "theirs"


@pytest.mark.parametrize("taken_by", ["out/file", "out/.hidden", "out/folder/file", "out"])
def test_a_place_that_is_taken_is_refused_before_the_block_runs(tmp_path, refused, taken_by):
    (tmp_path / taken_by).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / taken_by).write_text("mine")

    with refused(OutputFolderNotEmptyError, "'out'"), new_folder(tmp_path / "out"):
        pytest.fail("the block was run")
    with refused(OutputFolderNotEmptyError, "'out'"):
        refuse_nonempty(tmp_path / "out")


def test_a_place_below_a_file_is_refused(tmp_path, refused):
    (tmp_path / "file").write_text("mine")

    with refused(FlexOlmoError, "'file'"), new_folder(tmp_path / "file" / "out"):
        pytest.fail("the block was run")


@pytest.mark.parametrize("target", ["empty", "nowhere"])
def test_a_link_is_refused_before_the_block_runs(tmp_path, refused, target):
    (tmp_path / "empty").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / target)

    with refused(FlexOlmoError, "'out'"), new_folder(tmp_path / "out"):
        pytest.fail("the block was run")


def test_the_working_directory_is_refused_before_the_block_runs(tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)

    with refused(FlexOlmoError, "'.'"), new_folder("."):
        pytest.fail("the block was run")


def test_a_disk_that_is_too_small_is_refused_before_the_block_runs(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(folders.shutil, "disk_usage", disk_with(free=10**9))

    refusal = refused(NoSpaceError, "2,000.0 MB are needed and 1,000.0 MB are free")
    with refusal, new_folder(tmp_path / "out", needed_bytes=2 * 10**9):
        pytest.fail("the block was run")


def test_a_disk_that_is_just_large_enough_is_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(folders.shutil, "disk_usage", disk_with(free=1000))
    with new_folder(tmp_path / "out", needed_bytes=1000):
        pass

    assert (tmp_path / "out").is_dir()


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path, refused):
    with refused(NoSpaceError, "More space is needed"), new_folder(tmp_path / "out") as partial:
        (partial / "file").write_text("content")
        raise OSError(errno.ENOSPC, FULL, str(tmp_path))


def test_a_disk_without_room_for_a_folder_is_named(tmp_path, monkeypatch, refused):
    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, FULL, str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    with refused(NoSpaceError, "More space is needed"), new_folder(tmp_path / "out"):
        pytest.fail("the block was run")
