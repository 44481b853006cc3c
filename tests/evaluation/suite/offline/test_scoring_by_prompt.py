"""Where the beginning of a text settles how the rest is computed, an answer is scored by what its whole prompt says."""

import pytest
import torch

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines import (
    BranchTrainMergeForCausalLM,
    PromptRoutedForCausalLM,
    WeightedSoupForCausalLM,
    average_models,
)
from flexolmo_hf.evaluation.suite.offline.encoding import Request, encode
from flexolmo_hf.evaluation.suite.offline.generation import write_answers
from flexolmo_hf.evaluation.suite.offline.questions import OpenQuestion
from flexolmo_hf.evaluation.suite.offline.scoring import can_share_prefixes, score
from tests.conftest import dense_model
from tests.evaluation.baselines.chat import chat_model
from tests.evaluation.baselines.test_prompt_routing import BY_LETTER, LABELS, by_letter
from tests.evaluation.baselines.test_weighted_soup import weights_by_hand
from tests.modeling.test_expert_sets import named_model

SIZE = {"vocab_size": 258, "max_position_embeddings": 512}
# One byte is one token, so that these prompts have 20, and all but the last fewer than the default takes.
PROMPTS = ["m: two plus two is a", "c: for x in range(1)", "p: once upon a time,", "m: an example\n" * 6 + "c: then"]
ANSWERS = [" four", " or five", "?"]
REQUESTS = [Request(prompt, answer) for prompt in PROMPTS for answer in ANSWERS] + [
    # The same tokens are read for both, and their prompts differ.
    Request("c: the same", " words"),
    Request("c: the same wor", "ds"),
]
KINDS = ["routed dense", "routed mixture", "soup", "mean soup", "prefix ensemble", "running ensemble"]


@pytest.fixture
def members():
    return {name: dense_model(**SIZE, num_hidden_layers=1) for name in ("public", "math", "code")}


@pytest.fixture
def asked():
    return []


@pytest.fixture
def make(tokenizer, members, asked):
    """Make a model of a kind, of the members."""

    def made(kind):
        if kind == "soup":
            return WeightedSoupForCausalLM.from_members(members, temperature=20.0)
        if kind == "mean soup":
            return WeightedSoupForCausalLM.from_members(members, loss="mean", temperature=0.5, top_k=2)
        if kind == "prefix ensemble":
            return BranchTrainMergeForCausalLM.from_members(members, weights_from="prefix", top_k=1)
        if kind == "running ensemble":
            return BranchTrainMergeForCausalLM.from_members(members)
        experts = named_model(**SIZE) if kind == "routed mixture" else members
        model = PromptRoutedForCausalLM.from_models(experts, tokenizer, labels=LABELS, chat=chat_model())
        model.router.choose = by_letter(model.router, asked)
        return model

    return made


def logprobs(scores):
    return [one.logprob for one in scores]


@pytest.mark.parametrize("batch_tokens", [1, 4096])
@pytest.mark.parametrize("kind", ["routed dense", "routed mixture"])
def test_an_answer_to_a_short_prompt_is_the_chosen_experts_alone(tokenizer, make, members, asked, kind, batch_tokens):
    model = make(kind)
    found = score(model, tokenizer, REQUESTS, batch_tokens=batch_tokens, share_prefixes=False)

    for request, one in zip(REQUESTS, found, strict=True):
        name = BY_LETTER[request.context[0]]
        if kind == "routed dense":
            own = score(members[name], tokenizer, [request])
        else:
            own = score(model.answerers[0], tokenizer, [request], active_experts=list(dict.fromkeys(["public", name])))
        assert one.logprob == pytest.approx(own[0].logprob, abs=1e-3)
    # The whole prompt and nothing of the answer, each once.
    assert sorted(asked) == sorted({request.context for request in REQUESTS})


@pytest.mark.parametrize("settings", [{"temperature": 20.0}, {"loss": "mean", "temperature": 0.5, "top_k": 2}], ids=str)
@torch.no_grad()
def test_a_weighted_soup_scores_with_the_weights_that_the_prompt_asks_for(tokenizer, members, settings):
    soup = WeightedSoupForCausalLM.from_members(members, **settings)
    found = score(soup, tokenizer, REQUESTS, share_prefixes=False)
    plain = score(average_models(members), tokenizer, REQUESTS)

    for request, one in zip(REQUESTS, found, strict=True):
        prompt = torch.tensor([tokenizer(request.context)["input_ids"]])
        weights = weights_by_hand(members, prompt, prefix=prompt.shape[1], **settings)
        own = average_models(list(members.values()), weights=weights.tolist())
        assert one.logprob == pytest.approx(score(own, tokenizer, [request])[0].logprob, rel=1e-4)
    assert logprobs(found) != pytest.approx(logprobs(plain), rel=1e-3)


@torch.no_grad()
def test_an_ensemble_weighed_by_the_prefix_scores_with_what_did_best_on_the_prompt(tokenizer, make, members):
    found = score(make("prefix ensemble"), tokenizer, REQUESTS, share_prefixes=False)

    for request, one in zip(REQUESTS, found, strict=True):
        prompt = torch.tensor([tokenizer(request.context)["input_ids"]])
        best = int(weights_by_hand(members, prompt, prefix=prompt.shape[1]).argmax())
        own = score(list(members.values())[best], tokenizer, [request])
        assert one.logprob == pytest.approx(own[0].logprob, rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_different_lengths_are_scored_together_as_one_by_one(tokenizer, make, kind):
    model = make(kind)
    together = logprobs(score(model, tokenizer, REQUESTS, share_prefixes=False))
    alone = [score(model, tokenizer, [request], share_prefixes=False)[0].logprob for request in REQUESTS]

    assert together == pytest.approx(alone, rel=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_padded_row_is_computed_by_its_own_prompt(tokenizer, make, kind, side):
    model = make(kind)
    pieces = encode(tokenizer, REQUESTS, 500)
    longest = max(len(piece.inputs) for piece in pieces)
    ids, mask = (torch.zeros(len(pieces), longest, dtype=torch.long) for _ in range(2))
    for row, piece in enumerate(pieces):
        place = slice(longest - len(piece.inputs), longest) if side == "left" else slice(0, len(piece.inputs))
        ids[row, place], mask[row, place] = torch.tensor(piece.inputs), 1
    logits = model(ids, attention_mask=mask, **model.prompt_options([piece.prompt for piece in pieces])).logits

    for row, piece in enumerate(pieces):
        alone = model(torch.tensor(piece.inputs)[None], **model.prompt_options([piece.prompt])).logits[0]
        torch.testing.assert_close(logits[row][mask[row].bool()], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_without_a_context_the_models_default_holds(tokenizer, make, asked, kind):
    model, text = make(kind), "m: a text of more than so many tokens, " * 3
    found = score(model, tokenizer, [Request("", text), Request(PROMPTS[0], " four")], share_prefixes=False)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
    logprobs_TV = model(ids[:, :-1]).logits[0].double().log_softmax(-1)

    assert found[0].logprob == pytest.approx(logprobs_TV.gather(1, ids[0, 1:, None]).sum().item(), rel=1e-4)
    assert {len(query) for query in asked} <= {63, 20}


@pytest.mark.parametrize("kind", KINDS)
def test_such_models_read_every_prompt_anew(tokenizer, make, refused, kind):
    model = make(kind)

    assert not can_share_prefixes(model)
    with refused(ConfigurationError, "share_prefixes=False"):
        score(model, tokenizer, REQUESTS)


def test_the_pieces_of_a_long_answer_are_settled_by_what_comes_before_them(tokenizer):
    request = Request("x" * 20, "0123456789")
    for room in (40, 25, 4):
        whole = tokenizer(request.context + request.continuation)["input_ids"]
        scored = 0
        for piece in encode(tokenizer, [request], room):
            before = 20 + scored
            start = before + len(piece.targets) - 1 - len(piece.inputs)
            assert piece.inputs[: piece.prompt].tolist() == whole[start:before]
            assert piece.prompt > 0
            scored += len(piece.targets)
    assert [piece.prompt for piece in encode(tokenizer, [Request("", "0123456789")], 4)] == [0, 0, 0]


@pytest.mark.parametrize("kind", ["routed dense", "soup"])
@torch.no_grad()
def test_what_is_written_is_settled_by_the_prompt_as_what_is_scored(tokenizer, make, members, kind):
    model = make(kind)
    model.generation_config.eos_token_id = None
    questions = [OpenQuestion(prompt, None, max_tokens=5) for prompt in PROMPTS]
    for prompt, text in zip(PROMPTS, write_answers(model, tokenizer, questions), strict=True):
        own = members[BY_LETTER[prompt[0]]]
        if kind == "soup":
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            weights = weights_by_hand(members, ids, prefix=ids.shape[1], temperature=20.0)
            own = average_models(list(members.values()), weights=weights.tolist())
        own.generation_config.eos_token_id = None
        assert write_answers(own, tokenizer, [OpenQuestion(prompt, None, max_tokens=5)]) == [text]
