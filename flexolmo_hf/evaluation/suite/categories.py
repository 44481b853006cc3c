"""The table of the suite: 31 tasks in 10 categories, with what is asked and how it is counted.

Section 5 of the paper names the tasks and kinds of metric. The number of examples in a prompt is the usual one for each
task where it names none. The groups in ``groups/`` say the same to lm-evaluation-harness, and a test compares the two.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flexolmo_hf.errors import ConfigurationError, UnknownTaskError


@dataclass(frozen=True)
class SuiteTask:
    """One task.

    Attributes:
        name: What the table of results calls it.
        harness: The task or group of lm-evaluation-harness; empty for what a judge rates.
        shots: Examples in the prompt.
        metric: The harness's name of the metric.
        filter: The harness's name of what finds the answer in a generated text.
        generates: Whether the model writes; otherwise it only scores given answers.
        runs_code: Whether counting it executes what the model wrote.
        judged: Kind of text that a judge rates; empty for none.
    """

    name: str
    harness: str
    shots: int
    metric: str
    filter: str = "none"
    generates: bool = False
    runs_code: bool = False
    judged: str = ""


@dataclass(frozen=True)
class Category:
    """Tasks whose mean is one figure. Every task in it counts the same.

    Attributes:
        name: What `--suite` and the tables call it.
        title: What it is.
        members: Its tasks.
    """

    name: str
    title: str
    members: tuple[SuiteTask, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its tasks."""
        return tuple(task.name for task in self.members)

    @property
    def group(self) -> str:
        """The name of its group in lm-evaluation-harness."""
        return f"flexolmo_{self.name}"


def _chosen(name: str, metric: str, harness: str = "", shots: int = 5) -> SuiteTask:
    return SuiteTask(name, harness or name, shots, metric)


def _written(name: str, harness: str, shots: int, metric: str, filter: str = "none") -> SuiteTask:
    return SuiteTask(name, harness, shots, metric, filter, generates=True)


def _code(name: str, shots: int) -> SuiteTask:
    return SuiteTask(name, f"flexolmo_{name}", shots, "pass_at_1", generates=True, runs_code=True)


def _judged(name: str, kind: str) -> SuiteTask:
    return SuiteTask(name, "", 0, "judge", generates=True, judged=kind)


CATEGORIES: tuple[Category, ...] = (
    Category(
        "mc9",
        "Nine multiple-choice tasks",
        (
            _chosen("arc_easy", "acc_norm"),
            _chosen("arc_challenge", "acc_norm"),
            _chosen("boolq", "acc"),
            _chosen("csqa", "acc", "commonsense_qa"),
            _chosen("hellaswag", "acc_norm"),
            _chosen("openbookqa", "acc_norm"),
            _chosen("piqa", "acc_norm"),
            _chosen("socialiqa", "acc", "social_iqa"),
            _chosen("winogrande", "acc"),
        ),
    ),
    Category(
        "gen5",
        "Five short-answer tasks",
        (
            # A conversation is its own examples: all earlier questions stand in the prompt with their answers.
            _written("coqa", "flexolmo_coqa", 0, "f1"),
            _written("squad", "flexolmo_squad", 5, "f1"),
            _written("naturalqs", "flexolmo_naturalqs", 5, "f1"),
            _written("triviaqa", "flexolmo_triviaqa", 5, "f1"),
            _written("drop", "drop", 5, "f1"),
        ),
    ),
    Category("mmlu", "MMLU, 57 subjects", (_chosen("mmlu", "acc"),)),
    Category("mmlu_pro", "MMLU-Pro", (_written("mmlu_pro", "mmlu_pro", 5, "exact_match", "custom-extract"),)),
    # The harness has no examples to show for it.
    Category("agieval", "AGIEval, English", (_chosen("agieval", "acc", "agieval_en", 0),)),
    Category("bbh", "BIG-bench hard", (_written("bbh", "bbh_cot_fewshot", 3, "exact_match", "get-answer"),)),
    Category(
        "math2",
        "Two tasks of mathematics",
        (
            _written("gsm8k", "gsm8k_cot", 8, "exact_match", "flexible-extract"),
            _written("math", "flexolmo_math", 4, "exact_match"),
        ),
    ),
    Category(
        "code4",
        "Four programming tasks",
        (_code("mbpp", 3), _code("mbpp_plus", 3), _code("humaneval", 0), _code("humaneval_plus", 0)),
    ),
    Category(
        "sciriff5",
        "Five tasks on scientific papers",
        (
            # Their prompts are instructions with long extracts: examples would not fit beside them.
            _written("bioasq_factoid", "flexolmo_bioasq_factoid", 0, "f1"),
            _written("bioasq_general", "flexolmo_bioasq_general", 0, "f1"),
            _written("bioasq_yesno", "flexolmo_bioasq_yesno", 0, "exact_match"),
            _written("pubmedqa", "flexolmo_pubmedqa", 0, "exact_match"),
            _written("covidqa", "flexolmo_covidqa", 0, "f1"),
        ),
    ),
    Category("writing2", "News and poems, continued and judged", (_judged("newsg", "news"), _judged("poemg", "poem"))),
)

TASKS: dict[str, SuiteTask] = {task.name: task for category in CATEGORIES for task in category.members}

#: A suite of everything.
ALL = "all"


def category_of(task: str) -> str:
    """Name the category of a task; "own" for one that is not in the table."""
    return next((category.name for category in CATEGORIES if task in category.tasks), "own")


def suite_names() -> list[str]:
    """List what `--suite` understands: all, the categories, the tasks."""
    return list(dict.fromkeys([ALL, *(category.name for category in CATEGORIES), *TASKS]))


def resolve(names: Iterable[str], own: Sequence[str] = ()) -> list[str]:
    """Turn names of suites and tasks into tasks, each once, those of the table first and in its order.

    Args:
        names: Names, or several in one, joined by commas. Case and the difference of ``-`` and ``_`` do not matter.
        own: Tasks beyond the table that may be named as well.

    Raises:
        UnknownTaskError: If a name is none of these.
        ConfigurationError: If no name is given.
    """
    wanted = [name.strip() for item in names for name in item.split(",") if name.strip()]
    if not wanted:
        raise ConfigurationError("No suite and no task was named.", f"Name one or more of {', '.join(suite_names())}.")
    found = [task for name in wanted for task in _tasks_of(name, own)]
    return [*(task for task in TASKS if task in found), *dict.fromkeys(task for task in found if task not in TASKS)]


def _tasks_of(name: str, own: Sequence[str]) -> list[str]:
    if name in own:
        return [name]
    plain = re.sub(r"[-_ ]", "", name.lower())
    if plain == ALL:
        return list(TASKS)
    # A category of one task has the task's name.
    categories = {re.sub("_", "", category.name): list(category.tasks) for category in CATEGORIES}
    tasks = {re.sub("_", "", task): [task] for task in TASKS}
    if plain not in categories | tasks:
        raise UnknownTaskError(name, [*suite_names(), *own])
    return (tasks | categories)[plain]
