"""News and poems: where openings end, what is drawn, and that what the judge did not rate is never a zero."""

import json
from dataclasses import replace

import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.judge import judge_settings

pytest.importorskip("lm_eval")

from flexolmo_hf.evaluation.suite.language_model import FlexOlmoLM
from flexolmo_hf.evaluation.suite.writing import continue_openings, rate, read_openings, run_writing, summarise


class ScriptedJudge:
    """A judge that answers from a list, whatever it is asked."""

    name = "scripted"

    def __init__(self, *answers):
        self.script, self.asked = list(answers), []

    def answers(self, prompts, *, batch_size=8):
        self.asked += prompts
        return [self.script[i % len(self.script)] for i in range(len(prompts))]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Let continuations be short: their length decides nothing here."""
    settings = replace(judge_settings(), new_tokens=6)
    monkeypatch.setattr("flexolmo_hf.evaluation.suite.writing.judge_settings", lambda: settings)
    return settings


@pytest.fixture
def model(checkpoint):
    return FlexOlmoLM(str(checkpoint), device="cpu", batch_size=4)


def documents(folder, *texts):
    file = folder / "documents.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(file)


def test_the_opening_of_a_news_article_is_its_first_32_tokens(tmp_path, tokenizer):
    place = documents(tmp_path, "x" * 31, "abcd" * 8, "abcd" * 8 + " and more")

    assert read_openings(place, "news", tokenizer) == (["abcd" * 8], 2)


def test_the_opening_of_a_poem_is_its_first_four_lines(tmp_path, tokenizer):
    place = documents(tmp_path, "a\nb\n\nc\nd\ne\nf", "a\nb\nc\nd")

    assert read_openings(place, "poem", tokenizer) == (["a\nb\nc\nd\n"], 1)


def test_no_more_documents_are_read_than_were_asked_for(tmp_path, tokenizer):
    place = documents(tmp_path, *["a\nb\nc\nd\ne"] * 9)

    assert len(read_openings(place, "poem", tokenizer, limit=3)[0]) == 3


def test_documents_that_are_all_too_short_are_refused(tmp_path, refused, tokenizer):
    place = documents(tmp_path, "short", "shorter")

    with refused(ConfigurationError, "2 documents", "long enough"):
        read_openings(place, "news", tokenizer)


def test_each_opening_is_continued_five_times_and_the_seed_decides_how(model, short):
    openings = ["Once upon a time", "In the town of B"]
    first, again, other = (continue_openings(model, openings, short, seed=seed) for seed in (1, 1, 2))

    assert [len(texts) for texts in first] == [5, 5]
    assert len(set(first[0])) > 1
    assert first == again != other


def test_the_temperature_of_the_settings_is_that_of_the_drawing(model, short):
    (texts,) = continue_openings(model, ["Once upon a time"], replace(short, temperature=1e-4))

    # So cold that only the likeliest token is ever drawn.
    assert len(set(texts)) == 1


def test_a_model_with_no_room_for_a_continuation_is_refused(checkpoint, refused):
    model = FlexOlmoLM(str(checkpoint), device="cpu", max_length=10)

    with refused(ConfigurationError, "16 tokens", "10"):
        continue_openings(model, ["Once upon a time"], judge_settings())


def test_what_the_judge_did_not_rate_is_counted_as_failed_and_is_no_part_of_the_figure():
    found = summarise([[5, None, 3], [None, None, None], [1, 1, 1]], judge_settings(), "newsg")

    # (4/5 + 1/5) / 2: the second document has no rating and no weight.
    assert found.value == pytest.approx(0.5)
    assert (found.count, found.failed) == (5, 4)
    assert found.stderr == pytest.approx(0.3)
    assert found.details["rated_documents"] == 2


def test_a_judge_that_talks_nonsense_gives_no_figure_rather_than_zero(tmp_path, model):
    place = documents(tmp_path, "word " * 20, "other " * 20)
    found = run_writing(model, ScriptedJudge("What a lovely text!"), "newsg", "news", place)

    assert found.value is None
    assert (found.count, found.failed) == (0, 10)


def test_the_judge_is_shown_each_continuation_with_its_own_opening(model):
    judge = ScriptedJudge("0", "1", "2")
    ratings = rate(judge, "poem", ["roses", "violets"], [["a1", "a2"], ["b1"]])

    assert ratings == [[0, 1], [2]]
    assert ["roses" in asked for asked in judge.asked] == [True, True, False]
    assert [name for asked in judge.asked for name in ("a1", "a2", "b1") if f"\n{name}\n" in asked] == [
        "a1",
        "a2",
        "b1",
    ]


def test_ratings_become_a_share_of_the_best(tmp_path, model):
    place = documents(tmp_path, "a\nb\nc\nd\ne", "too short")
    found = run_writing(model, ScriptedJudge("4"), "poemg", "poem", place)

    assert found.value == pytest.approx(0.8)
    assert found.stderr is None
    assert found.details["too_short"] == 1
    assert found.details["judge"] == "scripted"
