"""What counts as a right answer in a model's own words, for each kind of question."""

import re
import string
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation

from flexolmo_hf.evaluation.suite.answers import score_answer
from flexolmo_hf.evaluation.suite.offline.formulas import boxed, same_formula
from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_SAID = re.compile(r"answer is", re.IGNORECASE)
_ARTICLES = {"a", "an", "the"}


def judge_answer(question: OpenQuestion, text: str) -> dict[str, float]:
    """Compare words with the accepted answers, as SQuAD does."""
    return score_answer(text, _accepted(question.accepted))


def judge_turn(question: OpenQuestion, text: str) -> dict[str, float]:
    """Compare words with all accepted answers but each in turn, and average, as CoQA does: people are measured so."""
    accepted = _accepted(question.accepted)
    rounds = [[*accepted[:i], *accepted[i + 1 :]] for i in range(len(accepted))] if len(accepted) > 1 else [accepted]
    scores = [score_answer(text, answers) for answers in rounds]
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


def judge_spans(question: OpenQuestion, text: str) -> dict[str, float]:
    """Compare words with the accepted lists of spans, as DROP does: a number has to be among the right ones."""
    counted = [_against_spans(text, spans) for spans in question.accepted]
    return {name: max(count[name] for count in counted) for name in ("f1", "exact_match")}


def judge_number(question: OpenQuestion, text: str) -> dict[str, float]:
    """Compare the number behind the last "answer is", or else the last number, with the right one."""
    said = list(_SAID.finditer(text))
    numbers = _NUMBER.findall(text[said[-1].end() :])[:1] if said else []
    numbers = numbers or _NUMBER.findall(text)[-1:]
    right = bool(numbers) and _value(numbers[0]) == _value(question.accepted)
    return {"exact_match": float(right)}


def judge_formula(question: OpenQuestion, text: str) -> dict[str, float]:
    """Compare the formula in the last box, or behind "final answer is", with the right one, by how they are written."""
    # The label in the requests has lost characters of some formulas; the document has them.
    return {"exact_match": float(same_formula(boxed(text), question.doc["answer"]))}


def _accepted(accepted: str | Sequence[str]) -> list[str]:
    return [accepted] if isinstance(accepted, str) else list(accepted)


def _against_spans(text: str, spans: Sequence[str]) -> dict[str, float]:
    given, right = _bag(text), [_bag(span) for span in spans]
    # The text is one span: it counts for the one it fits best, and the others are missing.
    best = max((_overlap(given, bag) for bag in right), default=0.0)
    return {"f1": best / max(1, len(right)), "exact_match": float([sorted(given)] == [sorted(bag) for bag in right])}


def _overlap(given: Sequence[str], right: Sequence[str]) -> float:
    numbers = {word for word in right if _value(word) is not None}
    if numbers and not numbers & set(given):
        return 0.0
    if not given or not right:
        return float(given == right)
    common = len(set(given) & set(right))
    return 2 * common / (len(set(given)) + len(set(right)))


def _bag(text: str) -> list[str]:
    return [word for part in re.split(r"[\s-]+", text.lower()) if (word := _word(part)) and word not in _ARTICLES]


def _word(part: str) -> str:
    if _value(part) is None:
        part = "".join(letter for letter in part if letter not in string.punctuation)
    value = _value(part)
    return part if value is None else str(float(value))


def _value(text: str) -> Decimal | None:
    try:
        value = Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None
    return value if value.is_finite() else None


#: By the name that the table of tasks gives them.
JUDGES: Mapping[str, Callable[[OpenQuestion, str], dict[str, float]]] = {
    "answers": judge_answer,
    "conversation": judge_turn,
    "spans": judge_spans,
    "number": judge_number,
    "formula": judge_formula,
}
