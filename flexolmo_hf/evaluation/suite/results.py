"""What a suite of tasks came to, for each set of experts, and the folder it is written to.

A score is a share from 0 to 1 in memory and in the JSON, and is shown out of 100; bits per byte are shown as they are.
A task that could not be scored has no value: it is left out of the means, and the means say how many they are of.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from flexolmo_hf._folder import new_folder
from flexolmo_hf.errors import ConfigurationError, DamagedFileError

#: Metrics that are no shares: shown as they are, and lower is better.
PLAIN_METRICS = ("bits_per_byte",)

#: The variant of tasks as lm-evaluation-harness runs them.
HARNESS = "harness"

_FORMAT = "flexolmo-suite-results/1"


@dataclass(frozen=True)
class TaskResult:
    """One task, measured with one set of experts.

    Attributes:
        task: The task's name in the table of categories.
        variant: How it was asked: "harness", or an offline variant such as "mc", "rc", "bpb".
        metric: What the value is.
        value: A share from 0 to 1, or bits per byte; None if nothing could be scored.
        stderr: Standard error of the value, in its unit, where it is known.
        count: Examples that were scored.
        failed: Examples that could not be; they are in neither `count` nor `value`.
        details: Anything else worth keeping: other metrics, shots, parts.
    """

    task: str
    variant: str
    metric: str
    value: float | None
    stderr: float | None = None
    count: int = 0
    failed: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> str:
        """The value as a table shows it, with its standard error."""
        if self.value is None:
            return "failed"
        plain = self.metric in PLAIN_METRICS
        scale, digits = (1, 3) if plain else (100, 1)
        error = "" if self.stderr is None else f" ± {self.stderr * scale:.{digits}f}"
        return f"{self.value * scale:.{digits}f}{error}"


@dataclass(frozen=True)
class Mean:
    """A mean over tasks or categories, and how many of how many it is of."""

    value: float
    of: int
    out_of: int


@dataclass(frozen=True)
class SetResult:
    """All tasks, measured with one set of experts.

    Attributes:
        experts: The set as it was asked for: "public+math", or "all".
        names: The experts that were in force; empty for a model without experts.
        fingerprint: Names what the set computes (`expert_set_key`); that of the model where it has no experts.
        tasks: The results.
        seconds: How long it took.
    """

    experts: str
    names: tuple[str, ...]
    fingerprint: str
    tasks: tuple[TaskResult, ...]
    seconds: float = 0.0

    def category_means(self, variant: str) -> dict[str, Mean]:
        """Average the tasks of each category that has any, in the order of the table.

        Bits per byte and shares are never averaged together: a category whose tasks have both has no mean.
        """
        from flexolmo_hf.evaluation.suite.categories import CATEGORIES

        found = {}
        for category in CATEGORIES:
            own = [task for task in self._scored(variant) if task.task in category.tasks]
            if own and len({task.metric in PLAIN_METRICS for task in own}) == 1:
                mean = fmean(task.value for task in own if task.value is not None)
                found[category.name] = Mean(mean, len(own), len(category.tasks))
        return found

    def average(self, variant: str) -> Mean | None:
        """Average the categories' means, each counting once; None where there is none or their units differ."""
        from flexolmo_hf.evaluation.suite.categories import CATEGORIES

        means = self.category_means(variant)
        if not means or len({task.metric in PLAIN_METRICS for task in self._scored(variant)}) > 1:
            return None
        return Mean(fmean(mean.value for mean in means.values()), len(means), len(CATEGORIES))

    def _scored(self, variant: str) -> list[TaskResult]:
        return [task for task in self.tasks if task.variant == variant and task.value is not None]


@dataclass(frozen=True)
class SuiteResult:
    """A suite of tasks, measured with one model and one or more sets of experts.

    Attributes:
        model: The model's name: of a path, the last component.
        model_type: Its `config.model_type`.
        fingerprint: sha256 over the model's settings and weights, as they were in memory.
        sets: The results for each set of experts.
        settings: What else decided them: limits, shots, the judge, versions of libraries.
    """

    model: str
    model_type: str
    fingerprint: str
    sets: tuple[SetResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """The variants that occur, in the order in which they came."""
        return list(dict.fromkeys(task.variant for one in self.sets for task in one.tasks))

    def __iter__(self) -> Iterator[TaskResult]:
        """Go through all results, one set after the other."""
        return (task for one in self.sets for task in one.tasks)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write ``results.json``, ``results.md`` and ``results.png`` into a folder that appears whole or not at all.

        Raises:
            OutputFolderNotEmptyError, OutputPlaceError: If there is no place for the folder.
            MissingExtraError: If matplotlib is not installed.
        """
        from flexolmo_hf.evaluation.suite.plot import plot_results
        from flexolmo_hf.evaluation.suite.table import markdown

        with new_folder(folder) as place:
            page = json.dumps(self.to_dict(), indent=2, ensure_ascii=False)
            (place / "results.json").write_text(page + "\n", encoding="utf-8")
            (place / "results.md").write_text(markdown(self), encoding="utf-8")
            plot_results(self, place / "results.png")
        return Path(folder)

    def to_dict(self) -> dict[str, Any]:
        """Give everything as JSON has it; the means are included for those who read nothing but the file."""
        sets = [asdict(one) | {"means": _means(one, self.variants)} for one in self.sets]
        return {"format": _FORMAT} | asdict(self) | {"sets": sets}

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "SuiteResult":
        """Read what `save` has written.

        Raises:
            ConfigurationError: If there is no ``results.json``.
            DamagedFileError: If it is not of this format.
        """
        file = Path(folder) / "results.json"
        if not file.is_file():
            raise ConfigurationError(f"There is no results.json in {file.parent.name!r}.", "Run `flexolmo eval` first.")
        try:
            read = json.loads(file.read_text(encoding="utf-8"))
            if read.pop("format") != _FORMAT:
                raise ValueError
            sets = tuple(_set_from(one) for one in read.pop("sets"))
            return cls(**read, sets=sets)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise DamagedFileError(file.name, f"it is not {_FORMAT}") from None


def _set_from(read: dict[str, Any]) -> SetResult:
    tasks = tuple(TaskResult(**task) for task in read.pop("tasks"))
    read.pop("means")
    return SetResult(**{**read, "names": tuple(read["names"])}, tasks=tasks)


def _means(one: SetResult, variants: Iterable[str]) -> dict[str, Any]:
    found = {}
    for variant in variants:
        average = one.average(variant)
        categories = {name: asdict(mean) for name, mean in one.category_means(variant).items()}
        found[variant] = {"categories": categories, "average": None if average is None else asdict(average)}
    return found


def rows_of(sets: Sequence[SetResult], variant: str) -> dict[tuple[str, str], list[TaskResult | None]]:
    """Line up the sets' results: for each task and metric, one result or None for each set."""
    keys = dict.fromkeys((task.task, task.metric) for one in sets for task in one.tasks if task.variant == variant)
    by_set = [{(task.task, task.metric): task for task in one.tasks if task.variant == variant} for one in sets]
    return {key: [one.get(key) for one in by_set] for key in keys}
