"""The harness's class: it scores what the model scores, with the experts that were named and no others."""

import pytest
import torch
from transformers import AutoTokenizer

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError, UnknownExpertError
from tests.conftest import dense_model
from tests.evaluation.baselines.chat import chat_model
from tests.evaluation.baselines.test_prompt_routing import BY_LETTER, LABELS, by_letter
from tests.modeling.test_expert_sets import poison

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from flexolmo_hf.evaluation.baselines import PromptRoutedForCausalLM
from flexolmo_hf.evaluation.suite.language_model import _KNOWN, _OF_THE_MODEL, HFLM, FlexOlmoLM

PAIRS = [("Two and two", " make four"), ("Two and two", " are"), ("Snow is", " cold"), ("A", " b")]


def requests():
    return [Instance("loglikelihood", {}, pair, number, ("t", number, 1)) for number, pair in enumerate(PAIRS)]


def scores(model):
    return [score for score, _ in model.loglikelihood(requests(), disable_tqdm=True)]


def test_the_harness_knows_the_class_by_name(checkpoint):
    made = get_model("flexolmo").create_from_arg_string(
        f"pretrained={checkpoint},active_experts=public+math", {"device": "cpu", "batch_size": 2}
    )

    assert type(made) is FlexOlmoLM
    assert made.model.expert_names == ["public", "math"]
    assert made.batch_size == 2


@torch.no_grad()
def test_a_continuation_scores_what_the_models_own_logits_say(checkpoint):
    model = FlexOlmoLM(str(checkpoint), device="cpu", batch_size=3)
    expected = []
    for context, continuation in PAIRS:
        before = model.tokenizer(context).input_ids
        after = model.tokenizer(continuation).input_ids
        logprobs = model.model(torch.tensor([before + after])).logits.log_softmax(-1)[0]
        expected.append(sum(logprobs[len(before) - 1 + i, token].item() for i, token in enumerate(after)))

    assert scores(model) == pytest.approx(expected, abs=1e-4)


def test_scores_are_those_of_the_harness_own_class_whatever_is_read_together(checkpoint):
    model = FlexOlmoLM(str(checkpoint), device="cpu", batch_tokens=40)
    theirs = HFLM(FlexOlmoForCausalLM.from_pretrained(checkpoint), tokenizer=model.tokenizer, batch_size=2)
    prompt = "Many questions begin with these very words, which are read once. "
    pairs = [(prompt + end, choice) for end in ("One is", "Two are ", "") for choice in (" a", " or b")] + [
        ("", "alone")
    ]
    asked = [Instance("loglikelihood", {}, pair, number, ("t", number, 1)) for number, pair in enumerate(pairs)]
    mine, expected = (one.loglikelihood(asked, disable_tqdm=True) for one in (model, theirs))

    assert [score for score, _ in mine] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in expected]


def test_no_more_is_read_than_was_asked_for(checkpoint):
    model = FlexOlmoLM(str(checkpoint), device="cpu", max_length=9)
    # One byte is one token: nine before the last fit.
    pairs = [("x" * 40 + "the end", " yes"), ("he end", " yes")]
    asked = [Instance("loglikelihood", {}, pair, number, ("t", number, 1)) for number, pair in enumerate(pairs)]
    (long, _), (short, _) = model.loglikelihood(asked, disable_tqdm=True)

    assert long == pytest.approx(short, rel=1e-6)


def test_a_set_chosen_in_memory_scores_as_one_left_out_at_load_bit_for_bit(checkpoint):
    model = FlexOlmoLM(str(checkpoint), device="cpu", batch_size=2)
    everything = scores(model)
    with model.using(["public", "math"]) as in_force:
        chosen = scores(model)
    loaded = FlexOlmoLM(str(checkpoint), active_experts="public+math", device="cpu", batch_size=2)

    assert in_force == ("public", "math")
    assert chosen == scores(loaded) != everything
    assert scores(model) == everything


def test_experts_outside_the_set_cannot_influence_a_score_or_a_text(checkpoint):
    model = FlexOlmoLM(str(checkpoint), device="cpu", batch_size=2)
    write = [Instance("generate_until", {}, ("Two", {"until": [], "max_gen_toks": 8, "do_sample": False}), 0)]
    with model.using(["public", "math"]):
        before = scores(model), model.generate_until(write, disable_tqdm=True)
        poison(model.model, ["code", "news"])
        after = scores(model), model.generate_until(write, disable_tqdm=True)

    assert before == after


def test_the_set_before_is_in_force_again_after_an_error(checkpoint):
    model = FlexOlmoLM(str(checkpoint), device="cpu")
    with pytest.raises(RuntimeError), model.using(["news"]):
        raise RuntimeError

    assert model.model.active_experts == model.model.expert_names


def test_a_model_in_memory_is_taken_as_it_is(checkpoint):
    inner = FlexOlmoForCausalLM.from_pretrained(checkpoint)
    model = FlexOlmoLM(inner, tokenizer=AutoTokenizer.from_pretrained(checkpoint), active_experts=["public"])

    assert model.model is inner
    assert inner.active_experts == ["public"]


def test_the_weights_have_the_type_that_was_asked_for(checkpoint):
    assert FlexOlmoLM(str(checkpoint), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_a_dense_model_is_known_and_has_no_experts_to_choose(tmp_path, tokenizer, refused):
    dense_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = FlexOlmoLM(str(tmp_path), device="cpu")
    with model.using(None) as in_force:
        assert in_force == ()

    with refused(ConfigurationError, "public+math", "no experts"):
        model.choose(["public", "math"])
    with refused(ConfigurationError, "public", "no experts"):
        FlexOlmoLM(str(tmp_path), device="cpu", active_experts="public")


@pytest.mark.parametrize(
    "name", ["active_expert", "trust_remote_code", "peft", "parallelize", "load_in_4bit", "softmax_dtype"]
)
def test_what_nothing_reads_is_refused(checkpoint, refused, name):
    with refused(UnknownArgumentError, name):
        FlexOlmoLM(str(checkpoint), device="cpu", **{name: True})


def test_an_unknown_expert_is_refused_before_anything_is_read(checkpoint, refused):
    with refused(UnknownExpertError, "maht", "Did you mean 'math'?"):
        FlexOlmoLM(str(checkpoint), device="cpu", active_experts="public+maht")


def test_everything_the_class_hands_on_is_read_by_the_harness():
    import inspect

    read = set(inspect.signature(HFLM.__init__).parameters)

    assert set(_KNOWN) - {"active_experts", "batch_tokens", *_OF_THE_MODEL} <= read


def test_a_baseline_made_of_several_models_is_scored_and_writes_as_it_does_itself(tmp_path, tokenizer):
    from flexolmo_hf.evaluation.baselines import BranchTrainMergeForCausalLM

    members = {name: dense_model(vocab_size=len(tokenizer)) for name in ("public", "math")}
    baseline = BranchTrainMergeForCausalLM.from_members(members)
    baseline.save_pretrained(tmp_path / "btm")
    tokenizer.save_pretrained(tmp_path / "btm")
    model = FlexOlmoLM(str(tmp_path / "btm"), device="cpu")
    ids = tokenizer("Two and two make four").input_ids
    with torch.no_grad():
        logprobs = baseline(torch.tensor([ids])).logits.log_softmax(-1)[0]
    border = len(tokenizer("Two and two").input_ids)
    expected = sum(logprobs[at - 1, ids[at]].item() for at in range(border, len(ids)))
    write = [Instance("generate_until", {}, ("Two", {"until": [], "max_gen_toks": 4, "do_sample": False}), 0)]
    written = baseline.generate(torch.tensor([tokenizer("Two").input_ids]), max_new_tokens=4, do_sample=False)[0, 3:]

    assert scores(model)[0] == pytest.approx(expected, abs=1e-4)
    assert model.generate_until(write, disable_tqdm=True) == [tokenizer.decode(written, skip_special_tokens=True)]


# The first letter of a prompt decides. All are shorter than the default, and of different lengths.
ROUTED = [
    ("m: two plus two is a", " four"),
    ("c: for x in", " range"),
    ("m: two plus two is a", " five"),
    ("p: x", "y"),
]


def routed_model(tokenizer, asked):
    """Route prompts among dense models, by their first letter."""
    experts = {name: dense_model(vocab_size=len(tokenizer)) for name in ("public", "math", "code")}
    model = PromptRoutedForCausalLM.from_models(experts, tokenizer, labels=LABELS, chat=chat_model())
    model.router.choose = by_letter(model.router, asked)
    return model, experts


def test_a_short_prompt_is_answered_by_the_expert_that_was_chosen_for_the_whole_of_it(tokenizer):
    asked = []
    inner, experts = routed_model(tokenizer, asked)
    requests = [Instance("loglikelihood", {}, pair, number, ("t", number, 1)) for number, pair in enumerate(ROUTED)]
    found = FlexOlmoLM(inner, tokenizer=tokenizer, device="cpu").loglikelihood(requests, disable_tqdm=True)

    for request, (logprob, greedy) in zip(requests, found, strict=True):
        own = FlexOlmoLM(experts[BY_LETTER[request.args[0][0]]], tokenizer=tokenizer, device="cpu")
        ((expected, chosen),) = own.loglikelihood([request], disable_tqdm=True)
        assert (logprob, greedy) == (pytest.approx(expected, abs=1e-4), chosen)
    assert sorted(asked) == sorted({prompt for prompt, _ in ROUTED})


def test_a_text_without_a_prompt_keeps_the_models_own_prefix(tokenizer):
    asked, text = [], "m: a text that nobody asks a question about, longer than the prefix"
    inner, _ = routed_model(tokenizer, asked)
    model = FlexOlmoLM(inner, tokenizer=tokenizer, device="cpu")
    (found,) = model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids]])
    with torch.no_grad():
        logprobs_TV = inner(ids[:, :-1]).logits[0].log_softmax(-1)

    assert found == pytest.approx(logprobs_TV.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-5)
    # The token that begins a document is the first of 64.
    assert set(asked) == {text[:63]}


@pytest.mark.parametrize("until", [[], ["q", "z", "4"]], ids=str)
def test_prompts_of_one_batch_are_continued_by_different_experts(tokenizer, until):
    asked = []
    inner, experts = routed_model(tokenizer, asked)
    settings = {"until": until, "max_gen_toks": 12, "do_sample": False}
    write = [Instance("generate_until", {}, (prompt, settings), i) for i, (prompt, _) in enumerate(ROUTED)]
    found = FlexOlmoLM(inner, tokenizer=tokenizer, device="cpu", batch_size=4).generate_until(write, disable_tqdm=True)

    for request, text in zip(write, found, strict=True):
        own = FlexOlmoLM(experts[BY_LETTER[request.args[0][0]]], tokenizer=tokenizer, device="cpu", batch_size=1)
        assert [text] == own.generate_until([request], disable_tqdm=True)
    assert set(asked) == {prompt for prompt, _ in ROUTED}
