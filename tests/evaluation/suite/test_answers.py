"""Short answers: the words that count, and the best of several accepted answers."""

import pytest

from flexolmo_hf.evaluation.suite.answers import (
    conversation,
    exact_match,
    f1,
    score_naturalqs,
    score_output,
    score_squad,
    score_triviaqa,
    score_turn,
    turn_answers,
)


@pytest.mark.parametrize("given", ["The Beatles.", "beatles", "  a   BEATLES!"])
def test_case_punctuation_articles_and_spacing_do_not_count(given):
    assert exact_match(given, ["the Beatles"]) == f1(given, ["the Beatles"]) == 1.0


@pytest.mark.parametrize(
    ("given", "accepted", "expected"),
    [
        # 2 of 3 words are right, 2 of 2 were found.
        ("big red house", ["red house"], 0.8),
        # A word counts as often as it is in both.
        ("red red red", ["red red"], 0.8),
        ("blue", ["red"], 0.0),
        ("", ["red"], 0.0),
        ("blue", ["red", "light blue"], 2 / 3),
        ("the", ["a"], 1.0),
    ],
)
def test_f1_weighs_the_words_found_against_the_words_given(given, accepted, expected):
    assert f1(given, accepted) == pytest.approx(expected)


def test_an_answer_that_only_contains_the_right_one_is_no_exact_match():
    assert exact_match("the red house", ["house"]) == 0.0


def test_each_data_sets_accepted_answers_are_found():
    right = {"f1": 1.0, "exact_match": 1.0}

    assert score_squad({"answers": {"text": ["x", "nine"]}}, ["Nine."]) == right
    assert score_naturalqs({"answer": ["x", "nine"]}, ["nine"]) == right
    assert score_triviaqa({"answer": {"value": "nine", "aliases": ["9"]}}, ["9"]) == right
    assert score_triviaqa({"answer": {"value": "nine", "aliases": ["9"]}}, ["nine"]) == right
    assert score_output({"output": "nine"}, ["nine"]) == right


COQA = {
    "story": "A cat sat.",
    "questions": {"input_text": ["Who?", "Where?"]},
    "answers": {"input_text": ["a cat", "on a mat"]},
    "additional_answers": {"0": {"input_text": ["cat", "the mat"]}, "1": {"input_text": ["it", "on a mat"]}},
}


def test_a_conversation_stops_before_the_last_answer():
    assert conversation(COQA) == "A cat sat.\n\nQ: Who?\n\nA: a cat\n\nQ: Where?\n\nA:"


def test_the_answers_to_the_last_question_are_collected_once_each():
    assert turn_answers(COQA) == ["on a mat", "the mat"]


def test_an_answer_within_a_conversation_is_compared_as_people_are_with_each_other():
    # Against "the mat" 2/3, against "on a mat" 1; each is left out once.
    assert score_turn(COQA, ["on a mat"])["f1"] == pytest.approx((1 + 2 / 3) / 2)
