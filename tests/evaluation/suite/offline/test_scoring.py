"""Sharing contexts changes no score; and what is scored are the tokens that lm-evaluation-harness scores."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.suite.offline.encoding import Request, encode
from flexolmo_hf.evaluation.suite.offline.scoring import can_share_prefixes, score
from tests.conftest import dense_model
from tests.modeling.test_expert_sets import named_model, poison

SIZE = {"vocab_size": 258, "max_position_embeddings": 512}
SHOTS = "Q: an example that all the others begin with\nA: yes\n\n" * 2
REQUESTS = [
    *(
        Request(f"{SHOTS}Q: is {number * 7919} a number {'or what ' * (number % 3)}?\nA:", f" {answer}")
        for number in range(3)
        for answer in ("yes it is", "no", "no way", "y", "maybe " * (number % 3 + 1))
    ),
    Request("", "nothing stands before it"),
    Request("def f():\n", "    return 1"),
    Request(f"{SHOTS}Q: is 0 a number ?\nA:", " no"),
]


def one_by_one(model, tokenizer, requests, **call):
    """Score each request by itself, without cache and padding."""
    found = []
    for piece in encode(tokenizer, requests, 10_000):
        with torch.no_grad():
            logits_TV = model(torch.tensor(piece.inputs)[None], **call).logits[0].double()
        logprobs_KV = logits_TV[-len(piece.targets) :].log_softmax(-1)
        targets = torch.tensor(piece.targets)
        logprob = logprobs_KV.gather(1, targets[:, None]).sum().item()
        found.append((logprob, len(targets), bool((logprobs_KV.argmax(1) == targets).all())))
    return found


@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("batch_tokens", [1, 400])
@pytest.mark.parametrize("kind", ["dense", "one of four", "a set of two"])
def test_scores_are_those_of_requests_read_one_by_one(tokenizer, kind, batch_tokens, share):
    model = dense_model(**SIZE) if kind == "dense" else named_model(1 if kind == "one of four" else 4, **SIZE)
    call = {"active_experts": ["public", "code"]} if kind == "a set of two" else {}
    requests = REQUESTS if batch_tokens > 1 else REQUESTS[3:8]
    found = score(model, tokenizer, requests, batch_tokens=batch_tokens, share_prefixes=share, **call)

    for one, (logprob, tokens, greedy) in zip(found, one_by_one(model, tokenizer, requests, **call), strict=True):
        assert one.logprob == pytest.approx(logprob, rel=1e-5)
        assert (one.tokens, one.greedy) == (tokens, greedy)


def test_a_greedy_continuation_is_recognised(tokenizer):
    model = named_model(**SIZE)
    prompt = tokenizer("Hello there", return_tensors="pt")["input_ids"]
    # Bytes of ASCII only: others do not survive the way through text.
    written = prompt
    ascii_ids = torch.tensor(tokenizer("".join(map(chr, range(33, 127))))["input_ids"])
    bias = torch.full((258,), -1e4)
    bias[ascii_ids] = 0.0
    head = model.lm_head
    model.lm_head = torch.nn.Linear(head.in_features, 258)
    model.lm_head.load_state_dict({"weight": head.weight, "bias": bias})
    for _ in range(5):
        with torch.no_grad():
            written = torch.cat([written, model(written).logits[:, -1:].argmax(-1)], dim=1)
    right = tokenizer.decode(written[0, prompt.shape[1] :])
    wrong = right[:-1] + ("x" if right[-1] != "x" else "y")

    scores = score(model, tokenizer, [Request("Hello there", right), Request("Hello there", wrong)])
    assert [one.greedy for one in scores] == [True, False]


def test_experts_that_are_off_do_not_speak_through_a_shared_prompt(tokenizer):
    model = named_model(2, **SIZE)
    before = score(model, tokenizer, REQUESTS, active_experts=["public", "math"])
    poison(model, ["code", "news"])

    assert score(model, tokenizer, REQUESTS, active_experts=["public", "math"]) == before
    with pytest.raises(ConfigurationError, match="NaN"):
        score(model, tokenizer, REQUESTS)


def test_a_shared_prompt_is_read_once(tokenizer):
    model = named_model(**SIZE)
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    # Questions of one length, so that there is no padding either.
    requests = [Request(f"{SHOTS}Q: {n}?\nA:", answer) for n in range(10, 20) for answer in (" a", " b", " c")]
    score(model, tokenizer, requests, batch_tokens=100_000)

    # One byte is one token. The last token of a continuation is not read.
    assert sum(seen) == len(SHOTS + "Q: 1") + 10 * len("0?\nA: ")


def test_logits_are_made_for_few_positions(tokenizer):
    model = named_model(**SIZE)
    made = []
    model.lm_head.register_forward_hook(lambda _, args, out: made.append(out.shape[1]))
    score(model, tokenizer, [Request(SHOTS, " no"), Request(SHOTS, " yes")])

    assert max(made) <= len(" yes")


@pytest.mark.parametrize(
    ("context", "continuation"),
    [("The cat", " sat"), ("x = ", "12"), ("line\n\n", "next"), ("", "alone"), ("", "<eos>alone"), ("über", " ∑🙂")],
)
def test_tokens_at_the_border_are_those_of_the_harness(tokenizer, context, continuation):
    HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
    # A merge across the border is what makes it matter.
    tokenizer.add_tokens([" sat", "= 1", "\nnext"])
    model = dense_model(**SIZE)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    instance = type("Instance", (), {"args": (context, continuation)})()
    captured = []
    harness._loglikelihood_tokens = lambda requests, **_: captured.extend(requests)
    harness.loglikelihood([instance], disable_tqdm=True)
    ((_, context_tokens, continuation_tokens),) = captured

    (piece,) = encode(tokenizer, [Request(context, continuation)], 100)
    assert list(piece.targets) == continuation_tokens
    assert piece.inputs.tolist() == (context_tokens + continuation_tokens)[:-1]


def test_a_long_context_loses_its_beginning(tokenizer):
    model = named_model(**SIZE)
    long, short = Request("x" * 40 + "the end", " yes"), Request("he end", " yes")

    scores = score(model, tokenizer, [long, short], max_length=9)
    assert scores[0].logprob == pytest.approx(scores[1].logprob, rel=1e-6)


def test_every_token_of_a_continuation_that_does_not_fit_is_scored_once(tokenizer):
    pieces = encode(tokenizer, [Request("ab", "0123456789")], 4)

    assert "".join(tokenizer.decode(list(piece.targets)) for piece in pieces) == "0123456789"
    for piece in pieces:
        assert len(piece.inputs) <= 4
        # The last target is what follows the inputs; the others are among them.
        assert list(piece.targets[:-1]) == piece.inputs[len(piece.inputs) - len(piece.targets) + 1 :].tolist()


@torch.no_grad()
def test_a_continuation_that_does_not_fit_is_the_sum_of_its_pieces(tokenizer):
    model, request = named_model(**SIZE), Request("ab", "0123456789")
    logprob = 0.0
    for piece in encode(tokenizer, [request], 4):
        logprobs_TV = model(torch.tensor(piece.inputs)[None]).logits[0].double().log_softmax(-1)
        targets = torch.tensor(piece.targets)
        logprob += logprobs_TV[-len(targets) :].gather(1, targets[:, None]).sum().item()

    (found,) = score(model, tokenizer, [request], max_length=4)
    assert (found.logprob, found.tokens) == (pytest.approx(logprob, rel=1e-5), 10)


def test_a_continuation_in_pieces_is_greedy_if_each_of_them_is(tokenizer):
    model = named_model(**SIZE)
    (favourite,) = tokenizer("y")["input_ids"]
    model.lm_head = torch.nn.Linear(model.lm_head.in_features, 258)
    model.lm_head.load_state_dict({"weight": torch.zeros_like(model.lm_head.weight), "bias": torch.eye(258)[favourite]})
    found = score(model, tokenizer, [Request("ab", end) for end in ("yyyyyyyy", "xxxxyyyy", "yyyyxxxx")], max_length=4)

    assert [one.greedy for one in found] == [True, False, False]


def test_a_model_that_sees_a_window_shares_nothing_and_says_so(tokenizer, refused):
    size = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=258, num_key_value_heads=2, **size)).eval()

    assert not can_share_prefixes(model)
    with refused(ConfigurationError, "Gemma2ForCausalLM", "share_prefixes=False"):
        score(model, tokenizer, REQUESTS)


def test_a_continuation_without_a_token_is_refused(tokenizer, refused):
    with refused(ConfigurationError, "request 1"):
        score(named_model(**SIZE), tokenizer, [Request("a", "b"), Request("a", "")])


def test_the_model_is_left_in_the_mode_it_was_in(tokenizer):
    model = named_model(**SIZE).train()
    score(model, tokenizer, REQUESTS[:2])

    assert model.training


def test_nan_is_refused_and_never_compared(tokenizer, refused):
    model = named_model(**SIZE)
    poison(model, ["math"])

    with refused(ConfigurationError, "NaN"):
        score(model, tokenizer, REQUESTS[:2])
