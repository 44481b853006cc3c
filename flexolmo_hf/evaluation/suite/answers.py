"""Counting short answers: exact match and F1 over words, as SQuAD defined them, for the groups' own tasks.

The best of all accepted answers counts. Case, punctuation, articles and spacing do not.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normal_words(text: str) -> list[str]:
    """Split an answer into the words that count."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def exact_match(given: str, accepted: Sequence[str]) -> float:
    """Return 1.0 if the answer has the words of one that is accepted, else 0.0."""
    return float(any(normal_words(given) == normal_words(answer) for answer in accepted))


def f1(given: str, accepted: Sequence[str]) -> float:
    """Return the harmonic mean of precision and recall of words, for the accepted answer it is best for."""
    return max((_f1(normal_words(given), normal_words(answer)) for answer in accepted), default=0.0)


def _f1(given: list[str], accepted: list[str]) -> float:
    if not given or not accepted:
        return float(given == accepted)
    common = sum((Counter(given) & Counter(accepted)).values())
    return 2 * common / (len(given) + len(accepted))


def score_answer(given: str, accepted: Sequence[str]) -> dict[str, float]:
    """Give both metrics for one answer."""
    return {"f1": f1(given, accepted), "exact_match": exact_match(given, accepted)}


def score_squad(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to a question of SQuAD."""
    return score_answer(results[0], doc["answers"]["text"])


def score_naturalqs(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to a question of Natural Questions."""
    return score_answer(results[0], doc["answer"])


def score_triviaqa(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to a question of TriviaQA."""
    return score_answer(results[0], [doc["answer"]["value"], *doc["answer"]["aliases"]])


def score_output(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer to a task of SciRIFF, which has one accepted output."""
    return score_answer(results[0], [doc["output"]])


def conversation(doc: Mapping[str, Any]) -> str:
    """Write a story of CoQA with its conversation up to the last question."""
    asked = _asked(doc)
    answered = doc["answers"]["input_text"][: len(asked) - 1]
    turns = [
        f"Q: {question}\n\nA:" + ("" if answer is None else f" {answer}\n\n")
        for question, answer in zip_longest(asked, answered)
    ]
    return f"{doc['story']}\n\n{''.join(turns)}"


def turn_answers(doc: Mapping[str, Any]) -> list[str]:
    """List the accepted answers to the last question of a conversation of CoQA."""
    turn = len(_asked(doc)) - 1
    others = [more["input_text"][turn] for more in (doc.get("additional_answers") or {}).values()]
    return list(dict.fromkeys([doc["answers"]["input_text"][turn], *others]))


def score_turn(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Score an answer within a conversation as CoQA does: against all answers but each in turn, then averaged."""
    accepted = turn_answers(doc)
    rounds = [accepted[:i] + accepted[i + 1 :] for i in range(len(accepted))] if len(accepted) > 1 else [accepted]
    scores = [score_answer(results[0], answers) for answers in rounds]
    return {metric: sum(score[metric] for score in scores) / len(scores) for metric in scores[0]}


def _asked(doc: Mapping[str, Any]) -> Sequence[str]:
    return doc["questions"]["input_text"]
