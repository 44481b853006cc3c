"""What a search for proxy data gives back: public text, and numbers about how it was found."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexolmo_hf._folder import new_folder
from flexolmo_hf.routing.classifier_report import ClassifierReport
from flexolmo_hf.routing.embedded import Tally
from flexolmo_hf.routing.leaks import LeakReport


@dataclass(frozen=True, repr=False)
class ProxySelection:
    """Public documents that look like an owner's private ones.

    It holds no private text, no private embedding and no classifier, and stays with the owner all the same: its scores
    are the classifier's answers, from which the classifier can be computed, and its order is theirs. Pass on the
    ``proxy.jsonl`` that `save` writes.

    Attributes:
        texts: The chosen documents, the best first, or in the order in which diversity chose them.
        indices: Their positions in the stream of public documents.
        scores: The classifier's probability for each that it is private, both kinds taken as equally frequent.
        classifier: How far the classifier can be trusted.
        leaks: How near the chosen documents are to private ones.
        public: Counts over the public documents.
        private: Counts over the private documents.
        repeated: Public documents left out because the same text was already a candidate.
        settings: How the choice was made.
    """

    texts: list[str]
    indices: list[int]
    scores: list[float]
    classifier: ClassifierReport
    leaks: LeakReport
    public: Tally
    private: Tally
    repeated: int
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.texts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.texts)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self)} of {self.public.read} public documents, "
            f"held-out accuracy {self.classifier.accuracy:.3f})"
        )

    def report(self) -> dict[str, Any]:
        """Give everything but the documents, their positions and scores; numbers and settings only."""
        names = ("classifier", "leaks", "public", "private")
        return {
            "chosen": len(self),
            **{name: asdict(getattr(self, name)) for name in names},
            "repeated": self.repeated,
            "settings": self.settings,
        }

    def save(self, folder: str | os.PathLike) -> None:
        """Write ``proxy.jsonl``, to pass on, and a folder ``owner``, which stays with the owner.

        ``proxy.jsonl`` holds the text and index of each document, in the order of the public corpus. ``owner`` holds
        ``scores.jsonl`` (index and score, in the order of the choice), ``report.json`` and ``report.md``; nobody else
        on the machine can open it.

        Args:
            folder: New or empty. Nothing is left there if writing fails.

        Raises:
            OutputFolderNotEmptyError, OutputPlaceError, NoSpaceError: If it cannot be written to.
        """
        with new_folder(folder) as place:
            # The order of the choice is that of the scores, which are a function of public text and of the classifier.
            in_corpus = sorted(zip(self.indices, self.texts, strict=True))
            passed_on = [{"text": text, "index": index} for index, text in in_corpus]
            scored = [{"index": index, "score": score} for index, score in zip(self.indices, self.scores, strict=True)]
            (place / "proxy.jsonl").write_text(_lines(passed_on), "utf8")
            owner = place / "owner"
            owner.mkdir(mode=0o700)
            _write_for_owner(owner / "scores.jsonl", _lines(scored))
            _write_for_owner(owner / "report.json", json.dumps(self.report(), indent=1) + "\n")
            _write_for_owner(owner / "report.md", self.markdown())

    def markdown(self) -> str:
        """Write the report as a page."""
        judge, leaks = self.classifier, self.leaks
        bins = [
            f"| {b.lower:.1f} to {b.upper:.1f} | {b.mean_predicted:.3f} | {b.fraction_private:.3f} | {b.count} |"
            for b in judge.calibration
        ]
        shares = [f"| {share} | {leaks.distance[share]:.3f} | {leaks.overlap[share]:.3f} |" for share in leaks.distance]
        return "\n".join(
            [
                "# Proxy data",
                "",
                "These figures are computed from private documents. They stay with the owner.",
                "",
                f"{len(self)} documents were chosen of {self.public.read} public ones ({self.public.empty} empty, "
                f"{self.public.unusable} without a usable embedding, {self.repeated} repeated among the best).",
                f"There were {self.private.read} private documents ({self.private.empty} empty, "
                f"{self.private.unusable} without a usable embedding).",
                "",
                "## Classifier",
                "",
                f"Held-out accuracy {judge.accuracy:.3f}, AUC {judge.auc:.3f}, calibration error "
                f"{judge.calibration_error:.3f}, both kinds counting the same.",
                f"Learned from {judge.trained_public} public and {judge.trained_private} private documents, measured "
                f"on {judge.held_out_public} and {judge.held_out_private} others.",
                "",
                "| predicted | mean predicted | fraction private | documents |",
                "|---|---|---|---|",
                *bins,
                "",
                "## Nearness to private documents",
                "",
                f"Of {leaks.candidates} candidates {leaks.removed} were removed as near-duplicates: "
                f"{leaks.removed_by_cosine} with a cosine of {leaks.cosine_limit} or more to a private document, "
                f"{leaks.removed_by_overlap} with {leaks.overlap_limit:.0%} or more of their 13-word sequences in one.",
                f"Of the chosen documents {leaks.sharing} share some 13-word sequence with a private one.",
                "",
                "| quantile of the chosen | cosine distance to the nearest | share of sequences |",
                "|---|---|---|",
                *shares,
                "",
                "## Settings",
                "",
                *(f"- {name}: {value}" for name, value in self.settings.items()),
                "",
            ]
        )


def _lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def _write_for_owner(file: Path, text: str) -> None:
    file.touch(mode=0o600)
    file.write_text(text, "utf8")
