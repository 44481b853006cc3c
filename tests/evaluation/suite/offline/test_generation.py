"""Answers written in batches are those written alone, and end where they are told to."""

import pytest

from flexolmo_hf.evaluation.suite.offline.generation import cut, write_answers
from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion
from tests.modeling.test_expert_sets import named_model, poison

SIZE = {"vocab_size": 258, "max_position_embeddings": 256}
PROMPTS = ["Q: short?\nA:", "Q: one that is quite a bit longer than the others?\nA:", "x", "Q: and this one?\nA:"]


def asked(stop=(), max_tokens=6):
    return [OpenQuestion(prompt, None, stop=stop, max_tokens=max_tokens) for prompt in PROMPTS]


def test_answers_do_not_depend_on_who_shares_the_batch(tokenizer):
    model = named_model(**SIZE)
    model.generation_config.eos_token_id = None
    together = write_answers(model, tokenizer, asked())

    assert together == [write_answers(model, tokenizer, [question])[0] for question in asked()]
    assert len(set(together)) > 1


def test_experts_that_are_off_write_nothing(tokenizer):
    model = named_model(2, **SIZE)
    before = write_answers(model, tokenizer, asked(), active_experts=["public", "math"])
    poison(model, ["code", "news"])

    assert write_answers(model, tokenizer, asked(), active_experts=["public", "math"]) == before


def test_an_answer_ends_before_the_first_stop(tokenizer):
    model = named_model(**SIZE)
    whole = write_answers(model, tokenizer, asked()[:1], batch_tokens=512)[0]
    stop = (whole[2:4], "never said")
    steps = []
    model.model.register_forward_hook(lambda *_: steps.append(1))

    assert write_answers(model, tokenizer, asked(stop)[:1]) == [whole[: whole.index(stop[0])]]
    # Bytes that are no text together show as one sign, so that the text may be shorter than its tokens.
    assert len(steps) < 6 or len(whole) < 6


def test_a_stop_that_ends_the_prompt_does_not_end_the_answer(tokenizer):
    model = named_model(**SIZE)
    whole = write_answers(model, tokenizer, asked()[:1])

    assert write_answers(model, tokenizer, asked(stop=("\nA:",))[:1]) == whole


def test_the_earliest_of_several_stops_cuts():
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one", ["two"]) == "one"


def test_a_prompt_makes_room_for_its_answer(tokenizer):
    model = named_model(**SIZE)
    lengths = []
    model.model.register_forward_pre_hook(
        lambda _, a, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    write_answers(model, tokenizer, [OpenQuestion("y" * 100, None, max_tokens=30)], max_length=40)

    assert lengths[0] == 20
    assert sum(lengths) <= 40


@pytest.mark.parametrize("batch_tokens", [1, 60])
def test_small_batches_write_the_same(tokenizer, batch_tokens):
    model = named_model(**SIZE)

    assert write_answers(model, tokenizer, asked(), batch_tokens=batch_tokens) == write_answers(
        model, tokenizer, asked()
    )
