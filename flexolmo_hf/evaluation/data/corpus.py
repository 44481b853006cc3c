"""A corpus on disk: a folder per domain with a file per split, and a record of what they hold."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flexolmo_hf.errors import ConfigurationError, DamagedFileError, _did_you_mean
from flexolmo_hf.evaluation.data.documents import read_documents

#: The record's file in the corpus' folder.
RECORD = "corpus.json"


@dataclass(frozen=True)
class Corpus:
    """A corpus that has been built.

    Attributes:
        folder: Where it lies.
        record: Settings, packages, and for each domain's splits documents, bytes, tokens and sha256.
        compared: The domains that were found equal to the lock file when the corpus was built.
    """

    folder: Path
    record: Mapping[str, Any] = field(repr=False)
    compared: tuple[str, ...] = ()

    @classmethod
    def open(cls, folder: str | os.PathLike) -> "Corpus":
        """Open a corpus.

        Raises:
            ConfigurationError: If there is none in the folder.
            DamagedFileError: If its record cannot be read.
        """
        path = Path(folder, RECORD)
        if not path.is_file():
            raise ConfigurationError(
                f"There is no corpus in {Path(folder).name!r}.", "Make one with `flexolmo data build OUTPUT`."
            )
        try:
            record = json.loads(path.read_text("utf8"))
        except ValueError:
            raise DamagedFileError(RECORD, "it is not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("domains"), dict):
            raise DamagedFileError(RECORD, "it names no domains")
        return cls(Path(folder), record)

    @property
    def domains(self) -> tuple[str, ...]:
        """List the domains."""
        return tuple(self.record["domains"])

    def splits(self, domain: str) -> tuple[str, ...]:
        """List the splits of a domain."""
        return tuple(self._known(domain, self.record["domains"], "domain")["splits"])

    def file(self, domain: str, split: str) -> Path:
        """Name the file with the texts of a split.

        Raises:
            ConfigurationError: If the corpus does not have them.
        """
        splits = self._known(domain, self.record["domains"], "domain")["splits"]
        self._known(split, splits, f"split of {domain!r}")
        return self.folder / domain / f"{split}.jsonl"

    def documents(self, domain: str, split: str) -> list[str]:
        """Read the texts of a split.

        Raises:
            ConfigurationError: If the corpus does not have them.
        """
        return read_documents(self.file(domain, split))

    @staticmethod
    def _known(name: str, known: Mapping[str, Any], what: str) -> Any:
        if name not in known:
            raise ConfigurationError(
                f"This corpus has no {what} {name!r}.{_did_you_mean(name, known)}", f"There are {', '.join(known)}."
            )
        return known[name]
