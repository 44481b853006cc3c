"""What written answers come to."""

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf.evaluation.suite.offline.choosing import flagged, standard_error
from flexolmo_hf.evaluation.suite.offline.generation import write_answers
from flexolmo_hf.evaluation.suite.offline.judges import JUDGES
from flexolmo_hf.evaluation.suite.offline.programs import run_program
from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion
from flexolmo_hf.evaluation.suite.offline.tasks import OfflineTask
from flexolmo_hf.evaluation.suite.results import TaskResult
from flexolmo_hf.evaluation.suite.sandbox import check_confinement


def sum_up_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: OfflineTask,
    questions: Sequence[OpenQuestion],
    reading: dict[str, Any],
) -> TaskResult:
    """Let a model answer a task's questions, and count.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: The task.
        questions: Its questions.
        reading: Settings of `write_answers`.

    Raises:
        SandboxError: If the answers are programs and cannot be confined here; nothing has been written then.
    """
    if task.runs_code:
        check_confinement()
    texts = write_answers(model, tokenizer, questions, **reading)
    details: dict[str, object] = {}
    if task.runs_code:
        outcomes = [run_program(task.judge, question, text) for question, text in zip(questions, texts, strict=True)]
        values = [float(outcome.passed) for outcome in outcomes]
        details["outcomes"] = dict(Counter(outcome.reason for outcome in outcomes))
    else:
        judge = JUDGES[task.judge]
        counts = [judge(question, text.strip()) for question, text in zip(questions, texts, strict=True)]
        values = [count[task.metric] for count in counts]
        details |= {name: fmean(count[name] for count in counts) for name in counts[0]}
    return TaskResult(
        task.name,
        "gen",
        task.metric,
        fmean(values),
        standard_error(values),
        len(values),
        details=flagged(task, details),
    )
