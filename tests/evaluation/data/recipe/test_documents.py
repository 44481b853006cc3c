import traceback

import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.decontamination import Decontaminator, document_hash
from flexolmo_hf.evaluation.data.recipe.documents import Pipeline, text_of
from flexolmo_hf.evaluation.data.recipe.filters import Filter
from flexolmo_hf.evaluation.data.recipe.repetition import SeenTexts
from flexolmo_hf.evaluation.data.recipe.schema import Source, Thread

THREAD = Source("t", "o/t", "MIT", thread=Thread("title", "body", "answers", score="score", most=2))
ROW = {
    "title": "Why?",
    "body": "I wonder.",
    "answers": [{"body": "worst", "score": 1}, {"body": "best", "score": "9"}, {"body": "good", "score": 5}],
}


@pytest.fixture
def pipeline():
    def make(*filters, evaluation=(), contaminated=None):
        source = Source("s", "o/s", "MIT", text="text", filters=filters)
        heard = [] if contaminated is None else contaminated
        return Pipeline(source, SeenTexts(100, 1e-6), Decontaminator(evaluation), {}, heard.append)

    return make


def test_a_discussion_becomes_the_question_and_its_best_answers():
    assert text_of(ROW, THREAD) == "Why?\n\nI wonder.\n\nbest\n\ngood"


def test_a_discussion_without_answers_is_its_question():
    assert text_of({**ROW, "answers": None, "body": None}, THREAD) == "Why?"


def test_answers_keep_their_order_without_a_score():
    source = Source("t", "o/t", "MIT", thread=Thread("title", "body", "answers", most=3))

    assert text_of(ROW, source).split("\n\n")[2:] == ["worst", "best", "good"]


def test_a_field_that_holds_no_text_is_refused():
    with pytest.raises(ConfigurationError, match="holds int, not text"):
        text_of({"text": 3}, Source("s", "o/s", "MIT", text="text"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"title": 3}, "'title' of the source 't' holds int, not text"),
        ({"answers": "secret"}, "'answers' of the source 't' holds str, not a list"),
        ({"answers": ["secret"]}, "no field 'body'"),
        ({"answers": [{"body": "because", "score": "secret"}]}, "'score' of the source 't' holds str, not a number"),
    ],
    ids=str,
)
def test_a_discussion_of_another_schema_is_refused_and_not_quoted(changes, says):
    with pytest.raises(ConfigurationError, match=says) as refused:
        text_of({**ROW, **changes}, THREAD)

    shown = "".join(traceback.format_exception(refused.value))
    assert "secret" not in shown and "c, e, e, r, s, t" not in shown


def test_half_a_character_becomes_one_that_can_be_written():
    assert text_of({"text": "a\ud800"}, Source("s", "o/s", "MIT", text="text")) == "a?"


def test_each_reason_for_dropping_is_counted_and_the_first_one_counts(pipeline):
    question = "one two three four five six seven eight nine ten eleven twelve thirteen"
    contaminated = []
    made = pipeline(Filter("words", (("min", 2),)), evaluation=[question], contaminated=contaminated)
    texts = ["", None, "single", "two words", "Two  words", question, "other words"]

    kept = list(made.documents({"text": text} for text in texts))

    assert kept == [None, None, None, "two words", None, None, "other words"]
    assert made.dropped == {"empty": 2, "words": 1, "repeated": 1, "contaminated": 1}
    assert contaminated == [document_hash(question)]
