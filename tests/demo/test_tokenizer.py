import pytest
from transformers import AutoTokenizer

from flexolmo_hf.demo.tokenizer import train_tokenizer

TEXTS = ["The quick brown fox jumps over the lazy dog. " * 20, "A public document about foxes and dogs. " * 20]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXTS, vocabulary=300, longest=64).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize(
    "text", ["def f(x):\n\treturn x ** 2\n", "$\\frac{1}{2}$", "  spaces , and . dots", "∑ 🙂\r\n"]
)
def test_any_text_comes_back_whole(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_vocabulary_has_the_asked_size(tokenizer):
    assert len(tokenizer) == 300
    assert len(tokenizer(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2


def test_nothing_is_added_to_a_text(tokenizer):
    assert tokenizer(" ")["input_ids"] == tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert len(tokenizer(" ")["input_ids"]) == 1


def test_trainers_find_end_and_padding_and_no_token_types(tokenizer):
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert list(tokenizer("x")) == ["input_ids", "attention_mask"]
    assert tokenizer.model_max_length == 64
