"""On a CPU the fused head makes logits for few tokens at once, which changes nothing but time and memory."""

import copy

import pytest
import torch
from trl.kernels import chunked_logprob

from benchmarks.training.memory import LargestTensor
from flexolmo_hf.trainers import fused_head
from tests.trainers.conftest import TEXT
from tests.trainers.test_freezing import state
from tests.trainers.test_memory import logits_of, wide  # noqa: F401 (a fixture)

CPU = torch.device("cpu")


@pytest.fixture
def at_once(monkeypatch):
    return lambda tokens: monkeypatch.setattr(fused_head, "TOKENS_AT_ONCE", tokens)


def test_training_and_evaluating_never_make_logits_of_more_tokens(trainer, wide, at_once):  # noqa: F811
    at_once(16)
    run = trainer(TEXT, using=wide, eval_rows=TEXT, max_steps=1)
    batch = next(iter(run.get_train_dataloader()))
    assert (batch["labels"][:, 1:]).numel() > 64
    with LargestTensor() as largest:
        run.train()
        run.evaluate()

    # The head's weight is larger than 16 tokens' piece of logits, and four times 16 tokens' piece would be larger yet.
    assert wide.lm_head.weight.numel() < 4 * 16 * 32_768 < logits_of(batch)
    assert largest.elements <= wide.lm_head.weight.numel()


def test_the_size_of_the_pieces_changes_only_rounding(trainer, model, at_once):
    ends = []
    for tokens in (3, 4096):
        at_once(tokens)
        run = trainer(TEXT, using=copy.deepcopy(model), max_steps=3, eval_rows=TEXT, optim="sgd")
        run.train()
        ends.append((state(run.model), run.evaluate()["eval_loss"]))

    (first, first_loss), (second, second_loss) = ends
    assert any(not torch.equal(tensor, state(model)[name]) for name, tensor in first.items())
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    assert first_loss == pytest.approx(second_loss, rel=1e-5)


def test_trls_own_size_is_back_after_the_block_and_after_an_error():
    before = chunked_logprob.TOKEN_CHUNK_SIZE

    with fused_head.small_pieces(CPU):
        assert chunked_logprob.TOKEN_CHUNK_SIZE == fused_head.TOKENS_AT_ONCE < before
    with pytest.raises(KeyError), fused_head.small_pieces(CPU):
        raise KeyError

    assert before == chunked_logprob.TOKEN_CHUNK_SIZE


def test_a_smaller_size_of_trls_stays(monkeypatch):
    monkeypatch.setattr(chunked_logprob, "TOKEN_CHUNK_SIZE", 5)

    with fused_head.small_pieces(CPU):
        assert chunked_logprob.TOKEN_CHUNK_SIZE == 5


def test_on_an_accelerator_nothing_changes():
    with fused_head.small_pieces(torch.device("cuda")):
        assert chunked_logprob.TOKEN_CHUNK_SIZE > fused_head.TOKENS_AT_ONCE
