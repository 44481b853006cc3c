"""What the scores of given answers come to: shares of questions answered right, and bits per byte."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte
from flexolmo_hf.evaluation.suite.offline.questions import Choices
from flexolmo_hf.evaluation.suite.offline.scoring import Score
from flexolmo_hf.evaluation.suite.offline.tasks import OfflineTask
from flexolmo_hf.evaluation.suite.results import TaskResult


def sum_up_choices(
    task: OfflineTask, variant: str, questions: Sequence[Choices], scores: Sequence[Sequence[Score]]
) -> TaskResult:
    """Count how many questions were answered right ("mc", "rc"), or average the bits per byte ("bpb").

    Args:
        task: The task.
        variant: The variant.
        questions: Its questions.
        scores: One per answer, for each question.
    """
    if variant == "bpb":
        return _bits_per_byte(task, questions, scores)
    rights = {
        name: [float(_pick(*pair, name) == pair[0].gold) for pair in zip(questions, scores, strict=True)]
        for name in ("acc", "acc_per_char", "acc_per_byte", "acc_per_token")
    }
    # Letters are of one length.
    metric = "acc" if variant == "mc" else task.shares
    details: dict[str, object] = {}
    if variant == "rc":
        details |= {name: fmean(values) for name, values in rights.items()}
    return _result(task, variant, metric, rights[metric], questions, details)


def answer_bits(questions: Sequence[Choices], scores: Sequence[Sequence[Score]]) -> list[BitsPerByte]:
    """Give the bits and UTF-8 bytes of each right answer, the space before it included: it is scored too."""
    found = []
    for question, own in zip(questions, scores, strict=True):
        right = own[question.gold]
        size = len(question.requests[question.gold].continuation.encode())
        found.append(BitsPerByte(-right.logprob / math.log(2), size, right.tokens))
    return found


def _bits_per_byte(task: OfflineTask, questions: Sequence[Choices], scores: Sequence[Sequence[Score]]) -> TaskResult:
    values = answer_bits(questions, scores)
    # Long answers weigh more in it than in the mean over questions.
    total = math.fsum(one.bits for one in values) / sum(one.bytes for one in values)
    return _result(task, "bpb", "bits_per_byte", [float(one) for one in values], questions, {"all_bytes": total})


def _pick(question: Choices, scores: Sequence[Score], metric: str) -> int:
    answers = [request.continuation for request in question.requests]
    sizes = {
        "acc": [1] * len(answers),
        "acc_per_char": [len(answer) for answer in answers],
        "acc_per_byte": [len(answer.encode()) for answer in answers],
        "acc_per_token": [score.tokens for score in scores],
    }[metric]
    means = [score.logprob / size for score, size in zip(scores, sizes, strict=True)]
    return means.index(max(means))


def _result(
    task: OfflineTask,
    variant: str,
    metric: str,
    values: Sequence[float],
    questions: Sequence[Choices],
    details: dict[str, object],
) -> TaskResult:
    groups: dict[str, list[float]] = {}
    for question, value in zip(questions, values, strict=True):
        groups.setdefault(question.group, []).append(value)
    if len(groups) > 1:
        details = {**details, "groups": {name: fmean(own) for name, own in groups.items()}}
    return TaskResult(
        task.name, variant, metric, fmean(values), standard_error(values), len(values), details=flagged(task, details)
    )


def flagged(task: OfflineTask, details: dict[str, object]) -> dict[str, object]:
    """Add which domains of the mini corpus have the same source as a task's questions."""
    return {**details, "in_distribution": list(task.in_distribution)} if task.in_distribution else details


def standard_error(values: Sequence[float]) -> float | None:
    """Return that of the mean of some values; None for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
