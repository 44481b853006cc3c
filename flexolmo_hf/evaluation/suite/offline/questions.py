"""From the rows of a wheel to questions with choices, and to questions that want a text."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from flexolmo_hf.errors import DamagedFileError
from flexolmo_hf.evaluation.suite.offline.encoding import Request, at_the_border
from flexolmo_hf.evaluation.suite.offline.tables import mmlu, triviaqa
from flexolmo_hf.evaluation.suite.offline.tasks import MMLU, TRIVIAQA, OfflineTask
from flexolmo_hf.evaluation.suite.offline.wheel import RequestWheel

_Any = TypeVar("_Any")

# Of a prompt that does not say how long its answer may be.
_LONGEST_ANSWER = 50


@dataclass(frozen=True)
class Choices:
    """A question whose answers are given; of "bpb", the right one alone.

    Attributes:
        requests: One per answer.
        gold: The position of the right one.
        group: The part of the task it belongs to; empty if there are none.
    """

    requests: tuple[Request, ...]
    gold: int
    group: str = ""


@dataclass(frozen=True)
class OpenQuestion:
    """A question that the model answers in its own words.

    Attributes:
        context: The prompt.
        accepted: The label in the requests, as the task's judge knows it.
        doc: The document behind it.
        stop: Texts that end an answer.
        max_tokens: The longest answer.
    """

    context: str
    accepted: Any
    doc: dict[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    max_tokens: int = _LONGEST_ANSWER


def load_choices(wheel: RequestWheel, task: OfflineTask, variant: str, limit: int | None = None) -> list[Choices]:
    """Read the questions of "mc", "rc" or "bpb".

    Args:
        wheel: Where they are.
        task: The task.
        variant: The variant.
        limit: At most so many, spread evenly over all; None for all.

    Raises:
        DamagedFileError: If a question lacks a choice or its answer.
    """
    if task.files[variant] == MMLU:
        rows: Iterable[dict[str, Any]] = mmlu(wheel, letters=variant == "mc")
    elif task.files[variant] == TRIVIAQA:
        rows = triviaqa(wheel)
    else:
        rows = _own_rows(wheel, task, variant)
    by_question: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_question.setdefault((row.get("group", ""), row["doc_id"]), []).append(row)
    questions = [_choices(same, group) for (group, _), same in by_question.items()]
    if variant == "bpb":
        questions = [_gold_alone(question) for question in questions]
    return _spread(questions, limit)


def load_open(wheel: RequestWheel, task: OfflineTask, limit: int | None = None) -> list[OpenQuestion]:
    """Read the questions of "gen"; arguments as of `load_choices`."""
    if task.files["gen"] == TRIVIAQA:
        rows: Iterable[dict[str, Any]] = triviaqa(wheel)
    else:
        rows = _own_rows(wheel, task, "gen")
    return _spread([_open(row) for row in rows], limit)


def _own_rows(wheel: RequestWheel, task: OfflineTask, variant: str) -> Iterable[dict[str, Any]]:
    for row in wheel.requests(task.files[variant]):
        if not task.only or str(row["doc"]["id"]).startswith(task.only):
            yield row


def _choices(rows: Sequence[dict[str, Any]], group: str) -> Choices:
    label = rows[0]["label"]
    if not isinstance(label, int):
        # Accepted answers, or nothing: the one continuation is the right answer.
        return Choices((_request(rows[0]),), 0, group)
    by_index = {row["idx"]: _request(row) for row in rows}
    if sorted(by_index) != list(range(len(by_index))) or not 0 <= label < len(by_index):
        raise DamagedFileError("requests.jsonl.gz", "a question lacks a choice, or its answer is none of them")
    return Choices(tuple(by_index[i] for i in range(len(by_index))), label, group)


def _request(row: dict[str, Any]) -> Request:
    continuation = row["request"]["continuation"]
    if continuation.startswith(" (") and _is_spans(row["label"]):
        # The requests of DROP print a tuple where their own examples show the bare answer.
        continuation = " " + ", ".join(row["label"][0])
    return Request(row["request"]["context"], continuation)


def _is_spans(label: Any) -> bool:
    return isinstance(label, list) and bool(label) and isinstance(label[0], list)


def _gold_alone(question: Choices) -> Choices:
    # What is scored and the bytes it is divided by are the same text: white space moves to where tokenizers have it.
    return Choices((at_the_border(question.requests[question.gold]),), 0, question.group)


def _open(row: dict[str, Any]) -> OpenQuestion:
    request = row["request"]
    most = request.get("generation_kwargs", {}).get("max_gen_toks", _LONGEST_ANSWER)
    stop = tuple(request.get("stop_sequences", ()))
    return OpenQuestion(request["context"], row["label"], row["doc"], stop, most)


def _spread(items: list[_Any], limit: int | None) -> list[_Any]:
    if limit is None or limit >= len(items):
        return items
    return [items[i * len(items) // limit] for i in range(limit)]
