"""What the suite's tasks ask, as texts that training documents are held against."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from flexolmo_hf._extras import require
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.categories import TASKS, resolve


def suite_questions(suites: Sequence[str], *, own: str | Path | None = None) -> Iterator[str]:
    """Read what tasks ask, each question alone and followed by its right answer.

    `flexolmo_hf.evaluation_texts` reads one package; this covers every task that the harness runs, with data from the
    Hub. They are loaded at once and read as one goes; nothing is executed.

    Args:
        suites: Names of suites and tasks, as ``flexolmo eval --suite`` takes them. Those that a judge rates have no
            questions and are left out.
        own: A folder of tasks of one's own, whose names may be among them.

    Returns:
        Texts, in the order of the tasks. Some repeat each other.

    Raises:
        UnknownTaskError: If a name is no suite and no task.
        ConfigurationError: If no task is left.
        MissingExtraError: If lm-evaluation-harness is not installed.
    """
    require("eval", "lm_eval", "datasets")
    from flexolmo_hf.evaluation.suite.harness import load_tasks, own_tasks, task_manager

    names = [name for name in resolve(suites, own_tasks(own)) if name not in TASKS or TASKS[name].harness]
    if not names:
        raise ConfigurationError(
            "What a judge rates asks nothing that could be looked for in documents.", "Name a suite with questions."
        )
    # Executing programs is part of scoring answers, and there are none here.
    return _texts_of(load_tasks(task_manager(own), names, allow_code=True)["tasks"].values())


def _texts_of(tasks: Iterable[Any]) -> Iterator[str]:
    for task in tasks:
        for document in task.eval_docs:
            question, answer = _question(task, document)
            yield question
            yield f"{question} {answer}"


def _question(task: Any, document: Any) -> tuple[str, str]:
    question, answer = task.doc_to_text(document), task.doc_to_target(document)
    choices = [] if task.config.doc_to_choice is None else task.doc_to_choice(document)
    if isinstance(question, int):
        # Some tasks choose between beginnings, each of which the same end follows.
        question = choices[question]
    elif isinstance(answer, int) and answer < len(choices):
        answer = choices[answer]
    return str(question), " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)
