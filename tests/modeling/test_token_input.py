"""Tokens are read in every form in which callers hold them, and padding is told from text."""

import pytest
import torch
from transformers import BatchEncoding, GenerationConfig
from transformers.generation import GenerateDecoderOnlyOutput

from flexolmo_hf import FlexOlmoConfig
from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError
from flexolmo_hf.modeling.token_input import read_tokens
from tests.conftest import TINY
from tests.modeling.test_expert_sets import named_model

CONFIG = FlexOlmoConfig(**TINY)


def read(given, mask=None, **generation):
    return read_tokens(given, mask, CONFIG, GenerationConfig(**generation))


def real_of(rows, mask=None, **generation):
    output = GenerateDecoderOnlyOutput(sequences=torch.tensor(rows))
    return read(output, None if mask is None else torch.tensor(mask), **generation)[1].long().tolist()


def test_every_token_counts_where_only_ids_are_given():
    ids, real = read(torch.tensor([0, 5, 1, 1], dtype=torch.int32), pad_token_id=0, eos_token_id=1)

    assert ids.tolist() == [[0, 5, 1, 1]]
    assert ids.dtype == torch.int64
    assert real.all()


def test_a_mask_may_be_of_integers_or_bool_and_without_a_batch():
    for mask in (torch.tensor([0, 1, 1]), torch.tensor([False, True, True]), torch.tensor([[0, 7, 1]])):
        assert read(torch.tensor([5, 6, 7]), mask)[1].tolist() == [[False, True, True]]


@pytest.mark.parametrize(
    ("settings", "rows", "want"),
    [
        ({"pad_token_id": 0, "eos_token_id": 1}, [[5, 6, 1, 0, 0], [5, 6, 7, 8, 1]], [[1, 1, 1, 0, 0], [1] * 5]),
        ({"pad_token_id": 0, "eos_token_id": 1}, [[5, 6, 1, 1, 1], [5, 6, 7, 8, 9]], [[1, 1, 1, 0, 0], [1] * 5]),
        ({"pad_token_id": 1, "eos_token_id": 1}, [[5, 6, 1, 1, 1], [5, 1, 7, 8, 9]], [[1, 1, 1, 0, 0], [1] * 5]),
        ({"eos_token_id": [1, 2]}, [[5, 6, 2, 1, 1], [5, 1, 7, 8, 2]], [[1, 1, 1, 0, 0], [1] * 5]),
        ({"pad_token_id": 0}, [[5, 6, 7, 0, 0], [5, 6, 7, 8, 1]], [[1, 1, 1, 0, 0], [1] * 5]),
        ({"pad_token_id": 0, "eos_token_id": 1}, [[0, 0, 7, 1, 0], [5, 6, 7, 8, 1]], [[0, 0, 1, 1, 0], [1] * 5]),
        ({}, [[5, 6, 7, 0, 0], [5, 6, 7, 8, 1]], [[1] * 5, [1] * 5]),
    ],
    ids=["greedy", "beams", "pad is end", "two ends, no pad", "no end", "prompt padded", "neither"],
)
def test_what_fills_up_finished_rows_is_padding(settings, rows, want):
    assert real_of(rows, **settings) == want


def test_a_mask_of_the_prompts_is_continued_over_what_was_generated():
    rows, mask = [[9, 9, 7, 5, 1, 1], [5, 0, 1, 1, 1, 1], [5, 6, 7, 0, 0, 0]], [[0, 0, 1], [1, 1, 1], [1, 1, 1]]

    assert real_of(rows, mask, pad_token_id=1, eos_token_id=1) == [
        [0, 0, 1, 1, 1, 0],
        # The prompt ends with an end, and so does what was generated, at once.
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("pad", [0, 1, None])
def test_real_outputs_of_generate_end_where_the_text_ends(input_ids, beams, pad):
    model = named_model(2)
    greedy = model.generate(input_ids, max_new_tokens=8, do_sample=False)
    model.generation_config.eos_token_id = end = int(greedy[0, 13])
    model.generation_config.pad_token_id = end if pad == 1 else pad
    mask = torch.ones_like(input_ids)
    output = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=8, num_beams=beams, do_sample=False, return_dict_in_generate=True
    )
    _, real = read_tokens(output, mask, model.config, model.generation_config)
    lengths = []
    for row in output.sequences[:, 11:].tolist():
        lengths.append(11 + (row.index(end) + 1 if end in row else len(row)))

    assert real.sum(dim=1).tolist() == lengths
    assert beams > 1 or min(lengths) < output.sequences.shape[1]


IDS = torch.tensor([[5, 6, 7], [8, 9, 10]])
REFUSED = {
    "no rows": ((torch.zeros(0, 3, dtype=torch.long),), r"shape \(0, 3\)"),
    "no tokens": ((torch.zeros(2, 0, dtype=torch.long),), r"shape \(2, 0\)"),
    "none at all": ((torch.tensor([], dtype=torch.long),), r"shape \(0,\)"),
    "three dimensions": ((IDS[None],), r"shape \(1, 2, 3\)"),
    "float": ((IDS.float(),), "dtype float32"),
    "bool": ((IDS.bool(),), "dtype bool"),
    "a list": (([[5, 6]],), "type list"),
    "text": (("some text",), "type str"),
    "outside the vocabulary": ((IDS + 90,), "from 0 to 96"),
    "negative": ((IDS - 6,), "from 0 to 96"),
    "no ids": (({"attention_mask": IDS},), "type NoneType"),
    "mask of another shape": ((IDS, torch.ones(2, 4, dtype=torch.long)), r"shape \(2, 4\).*shape \(2, 3\)"),
    "mask of one row": ((IDS, torch.ones(3, dtype=torch.long)), r"shape \(3,\)"),
    "mask of the prompts for ids": ((IDS, torch.ones(2, 2, dtype=torch.long)), r"shape \(2, 2\)"),
    "mask longer than the sequences": (
        ({"sequences": IDS}, torch.ones(2, 4, dtype=torch.long)),
        "or that of the prompts",
    ),
    "mask of fewer prompts": (({"sequences": IDS}, torch.ones(1, 2, dtype=torch.long)), r"shape \(1, 2\)"),
    "additive mask": ((IDS, torch.zeros(2, 3)), "dtype float32"),
    "mask as a list": ((IDS, [[1, 1, 1]]), "type list"),
    "two masks": ((BatchEncoding({"input_ids": IDS, "attention_mask": IDS}), IDS), "two attention masks"),
    "a row of padding": ((IDS, torch.tensor([[1, 1, 1], [0, 0, 0]])), "all of it is padding"),
}


@pytest.mark.parametrize(("arguments", "text"), REFUSED.values(), ids=REFUSED.keys())
def test_what_makes_no_sense_is_refused_without_showing_a_token(arguments, text):
    with pytest.raises(ConfigurationError, match=text) as caught:
        read(*arguments)
    assert "some text" not in str(caught.value)


def test_a_mapping_with_more_than_ids_and_a_mask_is_refused():
    with pytest.raises(UnknownArgumentError, match="position_ids"):
        read({"input_ids": IDS, "position_ids": IDS})
