import copy
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation import bits_per_byte

TEXTS = ["Three.", "A somewhat longer document than the others.", "x", "Kurz, aber schön: ∑ 🙂"]


@pytest.fixture
def tokenizer():
    """One token per byte, so that every count is known."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0, "<begin>": 1} | {symbol: i + 2 for i, symbol in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        attention_dropout=0.5,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def bits_by_hand(model, ids):
    """Bits of all tokens but the first, one forward pass without padding, one token at a time."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0].double()
    return -sum(
        (logits_TV[t - 1, ids[t]] - logits_TV[t - 1].exp().sum().log()).item() / math.log(2) for t in range(1, len(ids))
    )


def test_value_is_bits_over_bytes_computed_by_hand(model, tokenizer):
    found = bits_per_byte(model, tokenizer, TEXTS, max_length=64, batch_size=3)

    expected = sum(bits_by_hand(model, [0, *tokenizer(text)["input_ids"]]) for text in TEXTS)
    assert found.bits == pytest.approx(expected, rel=1e-5)
    assert found == pytest.approx(expected / sum(len(text.encode()) for text in TEXTS), rel=1e-5)


def test_bits_of_a_model_in_half_precision_are_summed_in_full(model, tokenizer):
    model.to(torch.bfloat16)
    found = bits_per_byte(model, tokenizer, TEXTS[1:2])

    assert found.bits == pytest.approx(bits_by_hand(model, [0, *tokenizer(TEXTS[1])["input_ids"]]), rel=1e-5)


def test_bytes_are_counted_where_a_token_has_several(model, tokenizer):
    tokenizer.add_tokens(["ree"])

    found = bits_per_byte(model, tokenizer, ["Three."], max_length=64)

    assert (found.bytes, found.tokens) == (6, 4)
    assert found == found.bits / 6


@pytest.mark.parametrize("batch_size", [2, 4, 100])
def test_padding_never_counts(model, tokenizer, batch_size):
    alone = bits_per_byte(model, tokenizer, TEXTS, max_length=64, batch_size=1)

    together = bits_per_byte(model, tokenizer, TEXTS, max_length=64, batch_size=batch_size)

    assert together.bits == pytest.approx(alone.bits, rel=1e-6)
    assert (together.bytes, together.tokens) == (alone.bytes, alone.tokens)


def test_long_document_is_cut_into_windows_that_share_one_token_of_context(model, tokenizer):
    text = "The quick brown fox."
    ids = [0, *tokenizer(text)["input_ids"]]
    assert len(ids) == 21

    found = bits_per_byte(model, tokenizer, [text], max_length=8)

    assert found.bits == pytest.approx(sum(bits_by_hand(model, w) for w in (ids[0:8], ids[7:15], ids[14:21])), rel=1e-5)


@pytest.mark.parametrize("max_length", [2, 3, 7, 43, 44, 45, 64])
def test_every_token_is_scored_exactly_once(model, tokenizer, max_length):
    # A model without an opinion needs log2(vocabulary) bits for a token, whatever stands before it.
    torch.nn.init.zeros_(model.lm_head.weight)

    found = bits_per_byte(model, tokenizer, TEXTS, max_length=max_length)

    assert found.tokens == found.bytes == sum(len(text.encode()) for text in TEXTS)
    assert found == pytest.approx(math.log2(260), rel=1e-6)


def test_document_starts_from_bos_where_the_tokenizer_has_one(model, tokenizer):
    tokenizer.bos_token = "<begin>"

    found = bits_per_byte(model, tokenizer, ["Three."], max_length=64)

    assert found.bits == pytest.approx(bits_by_hand(model, [1, *tokenizer("Three.")["input_ids"]]), rel=1e-5)


def test_measuring_switches_dropout_off_and_back_on(model, tokenizer):
    expected = bits_per_byte(model, tokenizer, TEXTS)
    model.train()

    found = bits_per_byte(model, tokenizer, TEXTS)

    assert found == expected
    assert model.training


def test_what_else_is_given_reaches_the_models_forward(model, tokenizer, monkeypatch):
    given, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda active_experts, **rest: given.append(active_experts) or forward(**rest)
    )

    bits_per_byte(model, tokenizer, TEXTS, batch_size=2, active_experts=["public"])

    assert given == [["public"]] * 2


def test_copy_keeps_what_was_measured(model, tokenizer):
    found = bits_per_byte(model, tokenizer, TEXTS)

    copied = copy.deepcopy(found)

    assert (copied, copied.bits, copied.bytes, copied.tokens) == (found, found.bits, found.bytes, found.tokens)


@pytest.mark.parametrize("texts", [[], ["", ""]], ids=["none", "empty"])
def test_nothing_to_score_is_refused(model, tokenizer, texts):
    with pytest.raises(ConfigurationError, match="no text to score"):
        bits_per_byte(model, tokenizer, texts)


def test_empty_document_among_others_counts_nothing(model, tokenizer):
    assert bits_per_byte(model, tokenizer, ["", *TEXTS]) == bits_per_byte(model, tokenizer, TEXTS)


def test_windows_beyond_the_models_positions_are_refused(model, tokenizer):
    with pytest.raises(ConfigurationError, match="201 tokens, but the model has 128 positions"):
        bits_per_byte(model, tokenizer, ["m" * 200], max_length=1024)


def test_without_a_length_windows_have_as_many_tokens_as_the_model_has_positions(model, tokenizer):
    text = "The quick brown fox jumps over the lazy dog. " * 5

    assert bits_per_byte(model, tokenizer, [text]).bits == bits_per_byte(model, tokenizer, [text], max_length=128).bits


@pytest.mark.parametrize("sizes", [{"max_length": 1}, {"batch_size": 0}], ids=str)
def test_sizes_that_leave_nothing_to_score_are_refused(model, tokenizer, sizes):
    with pytest.raises(ConfigurationError, match="leave nothing to score"):
        bits_per_byte(model, tokenizer, TEXTS, **sizes)


def test_tokenizer_without_bos_and_eos_is_refused(model, tokenizer):
    tokenizer.eos_token = None

    with pytest.raises(ConfigurationError, match="eos_token"):
        bits_per_byte(model, tokenizer, TEXTS)
