"""Prompts made of bare tables: examples show right answers and are never asked, and parts of a task stay apart."""

import re

import pytest

from flexolmo_hf.evaluation.suite.offline.questions import load_choices, load_open
from flexolmo_hf.evaluation.suite.offline.tasks import TASKS

SUBJECTS = ["algebra", "world_history"]


class Tables:
    """Stands in for the wheel: two subjects with six questions each, and seven bare questions."""

    def folders(self, parent):
        return SUBJECTS

    def table(self, folder):
        if folder.startswith("trivia_qa/"):
            return [
                {"question": f"trivia {n}?", "answer": {"value": f"v{n}", "aliases": [f"v{n}", f"w{n}"]}}
                for n in range(7)
            ]
        _, _, subject, split = folder.split("/")
        return [
            {"question": f"{split} {subject} {n}?", "choices": [f"{n}{x}" for x in "abcd"], "answer": n % 4}
            for n in range(6)
        ]


@pytest.mark.parametrize(
    ("variant", "shown", "right"), [("mc", list("ABCDA"), " B"), ("rc", ["0a", "1b", "2c", "3d", "4a"], " 1b")]
)
def test_the_examples_of_mmlu_are_of_the_subject_and_show_the_right_answers(variant, shown, right):
    question = load_choices(Tables(), TASKS["mmlu"], variant)[7]
    context = question.requests[question.gold].context

    assert re.findall(r"Answer: (.*)\n", context) == shown
    assert re.findall(r"Question: (.*)\?", context) == [
        *(f"dev world_history {n}" for n in range(5)),
        "test world_history 1",
    ]
    assert "about world history.\n" in context
    assert question.requests[question.gold].continuation == right


def test_questions_of_two_subjects_are_never_taken_for_one():
    questions = load_choices(Tables(), TASKS["mmlu"], "rc")

    assert [question.group for question in questions] == [name for name in SUBJECTS for _ in range(6)]
    assert {len(question.requests) for question in questions} == {4}


def test_the_examples_of_triviaqa_are_not_asked():
    first, second = load_open(Tables(), TASKS["triviaqa"])

    assert re.findall(r"Question: (.*)\?", first.context) == [f"trivia {n}" for n in range(6)]
    assert re.findall(r"Answer: (.*)\n", first.context) == [f"v{n}" for n in range(5)]
    assert second.context.endswith("Question: trivia 6?\nAnswer:")
    assert [one.accepted for one in (first, second)] == [["v5", "w5"], ["v6", "w6"]]
