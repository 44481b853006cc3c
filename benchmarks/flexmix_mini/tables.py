"""Figures of the study, read from its results: bits per byte by method and domain, with intervals."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.flexmix_mini.measuring import PUBLIC, documents_of
from benchmarks.flexmix_mini.place import Place
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte, together
from flexolmo_hf.evaluation.intervals import Interval, bootstrap_change

#: The order of a table's rows, and the paper's average over its tasks (arXiv 2507.07024): table 1, table 2.
METHODS: dict[str, tuple[float | None, float | None]] = {
    PUBLIC: (36.9, 42.4),
    "dense math": (42.5, None),
    "dense howto": (37.2, None),
    "dense code": (27.5, None),
    "soup": (39.6, None),
    "weighted soup": (42.2, None),
    "BTM top-2": (43.4, 47.6),
    "BTM all": (None, None),
    "prompt routing": (40.8, None),
    "BTX": (40.0, None),
    "FlexOlmo": (46.7, 51.3),
    "router tuning": (47.8, 52.4),
    "bias dropped": (None, None),
    "no bias": (45.8, None),
    "random rows, no bias": (44.4, None),
    "hidden-state rows": (43.5, None),
    "encoder rows": (None, None),
    "no coordination": (38.8, None),
    "unrestricted MoE, same compute": (46.3, None),
    "unrestricted MoE, same data": (51.5, None),
}


@dataclass(frozen=True)
class Scores:
    """What one model needs for each document, by domain."""

    documents: dict[str, list[BitsPerByte]]

    def bits(self, domain: str) -> float:
        """Return the bits per byte of a domain."""
        return float(together(self.documents[domain]))

    def average(self, domains: Iterable[str]) -> float:
        """Return the mean over domains, each counting the same."""
        return mean(self.bits(domain) for domain in domains)


def scores_of(place: Place, table: str, seed: int) -> dict[str, Scores]:
    """Read all models of a table with one seed, by label."""
    beginning = f"score-{table}-{seed}-"
    return {
        file.stem.removeprefix(beginning): Scores(documents_of(json.loads(file.read_text("utf8"))["found"]))
        for file in sorted((place.root / "results").glob(f"{beginning}*.json"))
    }


def kinds(scores: dict[str, Scores]) -> tuple[list[str], list[str]]:
    """Return the names of single domains and of mixed documents."""
    names = list(next(iter(scores.values())).documents)
    return [name for name in names if ":" not in name], [name for name in names if ":" in name]


def own_dense(scores: dict[str, Scores]) -> dict[str, float]:
    """Return what each owner's dense model needs for the owner's own domain."""
    return {
        label.removeprefix("dense "): found.bits(label.removeprefix("dense "))
        for label, found in scores.items()
        if label.startswith("dense ")
    }


@dataclass(frozen=True)
class Row:
    """One method in a table: mean over seeds, and the deviation where there are several."""

    label: str
    values: dict[str, float]
    deviation: dict[str, float]
    seeds: int


def rows_of(by_seed: Sequence[dict[str, Scores]]) -> list[Row]:
    """Average a table over its seeds."""
    singles, mixed = kinds(by_seed[0])
    labels = [label for label in METHODS if label in by_seed[0] and not label.startswith("dense ")]
    labels[1:1] = [label for label in by_seed[0] if label.startswith("dense ")]
    found = []
    for label in labels:
        scores = [scores[label] for scores in by_seed if label in scores]
        columns = {name: [score.bits(name) for score in scores] for name in (*singles, *mixed)}
        columns["domains"] = [score.average(singles) for score in scores]
        if mixed:
            columns["mixed"] = [score.average(mixed) for score in scores]
            columns["all"] = [score.average((*singles, *mixed)) for score in scores]
        values = {name: mean(column) for name, column in columns.items()}
        deviation = {name: stdev(column) if len(column) > 1 else 0.0 for name, column in columns.items()}
        found.append(Row(label, values, deviation, len(scores)))
    return found


def change(after: Scores, before: Scores, domain: str) -> tuple[float, Interval]:
    """Return the relative change of a domain's bits per byte, with its interval over documents."""
    return after.bits(domain) / before.bits(domain) - 1, bootstrap_change(
        after.documents[domain], before.documents[domain]
    )


def mean_difference(
    one: Sequence[Scores], other: Sequence[Scores], domains: Sequence[str], *, resamples: int = 2_000
) -> Interval:
    """Return the interval of the difference of two means over domains, on the same documents.

    Documents are drawn anew within each domain, the same for both, each with its mean over the seeds.

    Args:
        one: A method's scores, one for each seed.
        other: Another's, with the same seeds.
        domains: What to average over.
        resamples: How often documents are drawn.
    """
    drawn = np.random.default_rng(0)
    total = np.zeros(resamples)
    for domain in domains:
        bits = _bits_by_document(one, domain) - _bits_by_document(other, domain)
        sizes = np.array([document.bytes for document in one[0].documents[domain]])
        chosen = drawn.integers(len(bits), size=(resamples, len(bits)))
        total += bits[chosen].sum(1) / sizes[chosen].sum(1)
    low, high = np.percentile(total / len(domains), (2.5, 97.5))
    return Interval(float(low), float(high))


def _bits_by_document(scores: Sequence[Scores], domain: str) -> Any:
    return np.mean([[document.bits for document in seed.documents[domain]] for seed in scores], axis=0)
