"""What tasks ask can be held against training documents, whatever form a task has."""

import json

import pytest

from flexolmo_hf import Decontaminator, suite_questions
from flexolmo_hf.errors import ConfigurationError, UnknownTaskError
from tests.evaluation.suite.conftest import CHOICE, QUESTIONS

RIDDLE = "A boat carries nine crates across the lake and comes back empty; how often must it cross"


def task_of(folder, rows, **changes):
    """Write a task over rows into a folder, with some lines of its file changed."""
    data = folder.parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = CHOICE.format(name="riddles", file=data, cache=folder.parent / "cache").splitlines()
    # A list under a key goes with it.
    kept = [line for line in lines if line.split(":")[0] not in changes and not line.startswith("  -")]
    added = [f"{key}: {value}" for key, value in changes.items() if value]
    (folder / "riddles.yaml").write_text("\n".join(kept + added))
    return list(suite_questions(["riddles"], own=folder))


def test_each_question_is_read_alone_and_with_its_right_answer(own_tasks):
    texts = list(suite_questions(["colours"], own=own_tasks))
    alone = [row["question"] for row in QUESTIONS]
    answered = [f"{row['question']} {row['choices'][row['answer']]}" for row in QUESTIONS]
    assert texts == [text for pair in zip(alone, answered, strict=True) for text in pair]


def test_a_written_answer_and_several_right_ones_are_read(own_tasks):
    changes = {"output_type": "generate_until", "doc_to_choice": "", "metric_list": ""}
    rows = [{"question": RIDDLE, "answer": "six times"}]
    assert task_of(own_tasks, rows, **changes) == [RIDDLE, f"{RIDDLE} six times"]
    rows = [{"question": RIDDLE, "answer": ["six", "6"]}]
    assert task_of(own_tasks, rows, **changes)[1] == f"{RIDDLE} six 6"


def test_of_a_choice_between_beginnings_the_right_one_is_read(own_tasks):
    rows = [{"choices": ["The cup", "The boat"], "answer": 1, "end": "floats."}]
    changes = {"doc_to_text": "answer", "doc_to_target": '"{{end}}"'}
    assert task_of(own_tasks, rows, **changes) == ["The boat", "The boat floats."]


def test_a_document_that_holds_a_question_is_found(own_tasks):
    texts = task_of(own_tasks, [{"question": RIDDLE, "choices": ["six", "ten"], "answer": 0}])
    clean, dropped = Decontaminator(texts).split(["Nothing to see.", f"Once more: {RIDDLE.upper()}!"])
    assert clean == ["Nothing to see."]
    assert len(dropped) == 1


def test_names_are_checked_before_anything_is_read(own_tasks, refused):
    with refused(UnknownTaskError, "'colour'", "'colours'"):
        suite_questions(["colour"], own=own_tasks)
    with pytest.raises(ConfigurationError, match="a judge rates asks nothing"):
        suite_questions(["writing2"])


def test_data_that_the_hub_does_not_give_are_named_in_a_sentence(own_tasks, monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/riddles' on the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ConfigurationError, match="The data of colours could not be had from the Hub"):
        suite_questions(["colours"], own=own_tasks)
