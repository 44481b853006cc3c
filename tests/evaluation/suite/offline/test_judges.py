"""What counts as right."""

import pytest

from flexolmo_hf.evaluation.suite.offline.formulas import boxed, same_formula
from flexolmo_hf.evaluation.suite.offline.judges import JUDGES
from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion


def count(kind, accepted, text, **doc):
    return JUDGES[kind](OpenQuestion("", accepted, doc), text)


def test_words_count_without_articles_case_and_punctuation():
    assert count("answers", ["the Eiffel Tower", "Paris"], "Eiffel tower.") == {"f1": 1.0, "exact_match": 1.0}
    assert count("answers", "black cat", "a black dog")["f1"] == pytest.approx(0.5)


def test_a_turn_is_measured_against_all_people_but_one_at_a_time():
    # Without the first it matches the second; without the second nothing.
    assert count("conversation", ["red", "blue"], "blue")["f1"] == pytest.approx(0.5)
    assert count("conversation", ["red"], "red")["exact_match"] == 1.0


def test_a_wrong_number_scores_nothing_in_drop():
    assert count("spans", [["26 yards"]], "27 yards")["f1"] == 0.0
    assert count("spans", [["26 yards"]], "26 yards") == {"f1": 1.0, "exact_match": 1.0}
    assert count("spans", [["1,507"], ["1477"]], "1507.0")["exact_match"] == 1.0


def test_spans_that_are_missing_count_as_nothing():
    assert count("spans", [["Spain", "Italy"]], "Spain") == {"f1": pytest.approx(0.5), "exact_match": 0.0}
    assert count("spans", [["Spain", "Italy"], ["Spain"]], "Spain")["f1"] == 1.0


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("9 * 2 = 18. So the answer is 18.", 1.0),
        ("So the answer is $1,018.", 0.0),
        ("It is 17, no: 18", 1.0),
        ("So the answer is 18. There were 3 of them", 1.0),
        ("The answer is 3. No, wait: the answer is 18, not 4", 1.0),
        ("nothing", 0.0),
        ("", 0.0),
    ],
)
def test_the_number_that_is_said_to_be_the_answer_counts(text, right):
    assert count("number", "18", text)["exact_match"] == right


def test_a_number_may_have_commas_and_an_empty_fraction():
    assert count("number", "1,018", "the answer is 1018.0")["exact_match"] == 1.0


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (r"\dfrac12", r"\frac{1}{2}"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})"),
        ("1/2", r"\frac{1}{2}"),
        (r"90^\circ", "90"),
        (r"12,345", "12345"),
        (r"x=5", "5"),
        (r"\$5", "5"),
        (r"\text{Evelyn}", r"\text{Evelyn}"),
    ],
)
def test_formulas_that_only_look_different_are_the_same(given, right):
    assert same_formula(given, right)


@pytest.mark.parametrize(
    ("given", "right"),
    [("2", "3"), (None, "3"), (r"\frac{1}{3}", r"\frac{1}{2}"), ("x+1", "1"), ("(1,2)", "(12)"), ("1,2,3", "123")],
)
def test_other_formulas_are_not(given, right):
    assert not same_formula(given, right)


def test_the_last_box_is_the_answer_with_all_its_braces():
    assert boxed(r"First \boxed{1}, then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert boxed("Final Answer: The final answer is $16$. I hope it is correct.") == "16"
    assert boxed(r"an open \boxed{1") is None
    assert boxed("nothing") is None


def test_math_is_judged_by_the_document_since_the_label_has_lost_characters():
    text = r"so $\boxed{\left( 3, \frac{\pi}{2} \right)}$"
    assert count("formula", r"\le(3,\frac{\pi}{2}\right)", text, answer=r"\left( 3, \frac{\pi}{2} \right)") == {
        "exact_match": 1.0
    }
