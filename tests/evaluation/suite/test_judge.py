"""The judge: ratings are numbers of the scale or failures, and continuations cannot change the question."""

import pytest

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.judge import Judge, judge_settings
from tests.conftest import byte_tokenizer, dense_model

CHAT = "{% for message in messages %}{{ message.content }}\n{% endfor %}> "


@pytest.fixture
def settings():
    return judge_settings()


@pytest.mark.parametrize(
    ("answer", "rating"),
    [
        ("4", 4),
        (" 0\n", 0),
        ("**5**", 5),
        ("Rating: 3", 3),
        ("Score is 2.", 2),
        ("4/5", 4),
        ("3 out of 5", 3),
        ("1 because it wanders off", 1),
        # No number of the scale.
        ("6", None),
        ("10", None),
        ("-1", None),
        ("3.5", None),
        ("4/10", None),
        ("2-3", None),
        ("3 or 4", None),
        ("4 out of 10", None),
        ("", None),
        ("good", None),
        ("I read 5 lines", None),
        ("four", None),
    ],
)
def test_an_answer_is_a_number_of_the_scale_or_none_at_all(settings, answer, rating):
    assert settings.read(answer) == rating


def test_the_question_holds_both_texts_and_the_scale(settings):
    prompt = settings.ask("poem", "Roses are {red}", "{lowest} violets")

    assert "Roses are {red}" in prompt
    assert "{lowest} violets" in prompt
    assert "from 0 to 5" in prompt


def test_openings_and_sampling_are_those_of_the_paper(settings):
    assert settings.opening == {"news": {"tokens": 32}, "poem": {"lines": 4}}
    assert (settings.temperature, settings.samples) == (0.8, 5)
    assert (settings.lowest, settings.highest) == (0, 5)


def test_a_model_without_a_chat_template_is_no_judge(refused, tokenizer):
    with refused(ConfigurationError, "'plain'", "chat template"):
        Judge(dense_model(vocab_size=len(tokenizer)), tokenizer, "plain")


def test_answers_come_in_the_order_of_the_prompts_whatever_the_batches(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    dense_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    judge = Judge.from_pretrained(tmp_path / "chat")
    prompts = ["one", "a much longer prompt than the first", "three", "and four"]
    alone = [judge.answers([prompt])[0] for prompt in prompts]

    assert judge.answers(prompts, batch_size=2) == alone
    assert judge.name == "chat"
    assert len(set(alone)) > 1
