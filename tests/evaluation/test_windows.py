"""Documents are cut so that every token is scored once, given what stands before it."""

import pytest
from tokenizers import processors
from transformers import LlamaConfig, PreTrainedConfig

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.baselines.branch_train_merge import BranchTrainMergeConfig
from flexolmo_hf.evaluation.bits_per_byte import bits_by_document, bits_per_byte
from flexolmo_hf.evaluation.windows import (
    Window,
    batched_by_length,
    cut_into_windows,
    padded,
    refuse_one_string,
    refuse_sizes,
    start_token,
    window_length,
)

EOS = 1


def ids_of(tokenizer, text):
    return [tokenizer.convert_tokens_to_ids(symbol) for symbol in text]


def cut(tokenizer, *texts, max_length):
    return list(cut_into_windows(tokenizer, texts, max_length))


def test_a_document_begins_with_eos_and_each_later_window_with_the_last_token_before_it(tokenizer):
    a, b, c, d, e, f, g = ids_of(tokenizer, "abcdefg")

    assert cut(tokenizer, "abcdefg", max_length=4) == [
        Window(0, [EOS, a, b, c]),
        Window(0, [c, d, e, f]),
        Window(0, [f, g]),
    ]


def test_a_document_that_just_fits_has_one_window_and_one_token_more_makes_two(tokenizer):
    assert [len(window.tokens) for window in cut(tokenizer, "abc", max_length=4)] == [4]
    assert [len(window.tokens) for window in cut(tokenizer, "abcd", max_length=4)] == [4, 2]


@pytest.mark.parametrize("max_length", [2, 3, 7, 20, 21, 100])
def test_what_is_scored_in_all_windows_is_the_document(tokenizer, max_length):
    texts = ["a document of 19 byt", "b", "", "another"]
    windows = cut(tokenizer, *texts, max_length=max_length)

    for index, text in enumerate(texts):
        scored = [token for window in windows if window.document == index for token in window.tokens[1:]]
        assert scored == ids_of(tokenizer, text.replace(" ", "Ġ"))
    assert max(len(window.tokens) for window in windows) <= max_length


def test_an_empty_text_has_no_window_and_keeps_its_place(tokenizer):
    assert [window.document for window in cut(tokenizer, "", "a", "", "b", max_length=4)] == [1, 3]


def test_a_document_begins_with_bos_where_there_is_one(tokenizer):
    tokenizer.bos_token = "a"

    assert start_token(tokenizer) == ids_of(tokenizer, "a")[0]


def test_a_tokenizer_with_neither_is_refused(tokenizer):
    tokenizer.eos_token = None

    with pytest.raises(ConfigurationError, match="neither BOS nor EOS"):
        cut(tokenizer, "a", max_length=4)


def test_a_tokenizer_that_adds_tokens_by_itself_adds_none(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", EOS)]
    )
    assert tokenizer("a")["input_ids"] == [EOS, *ids_of(tokenizer, "a"), EOS]

    assert cut(tokenizer, "a", max_length=8) == [Window(0, [EOS, *ids_of(tokenizer, "a")])]


def test_documents_are_read_one_after_the_other(tokenizer):
    def stream():
        yield "first"
        raise AssertionError("the second was read before it was needed")

    assert next(iter(cut_into_windows(tokenizer, stream(), 100))).document == 0


def test_batches_hold_the_longest_first_and_each_window_once():
    windows = [Window(place, list(range(size))) for place, size in enumerate((2, 5, 3, 5, 4))]

    assert [[window.document for window in batch] for batch in batched_by_length(windows, 2)] == [[1, 3], [4, 2], [0]]


def test_padding_is_behind_the_tokens_or_before_them():
    windows = [Window(0, [7, 8, 9]), Window(1, [5, 6])]

    ids, mask = padded(windows)
    assert (ids.tolist(), mask.tolist()) == ([[7, 8, 9], [5, 6, 0]], [[1, 1, 1], [1, 1, 0]])
    ids, mask = padded(windows, left=True)
    assert (ids.tolist(), mask.tolist()) == ([[7, 8, 9], [0, 5, 6]], [[1, 1, 1], [0, 1, 1]])


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (LlamaConfig(max_position_embeddings=128), 128),
        (LlamaConfig(max_position_embeddings=4096), 1024),
        (BranchTrainMergeConfig(member_names=["public"], max_position_embeddings=128), 128),
        (PreTrainedConfig(), 1024),
    ],
    ids=["fewer positions", "more positions", "a baseline", "any number of positions"],
)
def test_a_window_has_1024_tokens_or_the_models_fewer_positions_unless_told_otherwise(config, length):
    assert window_length(config, None) == length
    assert window_length(config, 300) == 300


def test_sizes_that_score_nothing_are_refused_and_the_least_that_do_are_not():
    refuse_sizes(2, 1)
    refuse_sizes(None, 1)
    for sizes in ((1, 1), (2, 0), (None, 0)):
        with pytest.raises(ConfigurationError, match="leave nothing to score"):
            refuse_sizes(*sizes)


def test_one_text_in_the_place_of_many_is_refused(tokenizer):
    refuse_one_string(["text"])
    with pytest.raises(ConfigurationError, match="of 'math' are one string"):
        refuse_one_string("text", " of 'math'")
    for measure in (bits_by_document, bits_per_byte):
        with pytest.raises(ConfigurationError, match="one string"):
            measure(None, tokenizer, "text")
