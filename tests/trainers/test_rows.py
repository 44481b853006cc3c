"""Data that hold nothing to train on are refused, and the message holds nothing of them."""

import pytest
from datasets import Dataset, IterableDataset

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.rows import refuse_too_short, refuse_unreadable
from tests.trainers.conftest import TEXT


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"body": "private words"}], "'text', 'prompt' and 'completion', or 'messages'"),
        ([{"prompt": "private words"}], "hold nothing to train on"),
        ([{"input_ids": [5]}, {"input_ids": [6]}], "None of the 2 rows is longer than one token"),
    ],
    ids=["empty", "no text column", "half a pair", "one token each"],
)
def test_such_data_are_refused(trainer, rows, message):
    with pytest.raises(ConfigurationError, match=message) as caught:
        trainer(rows)
    assert "private" not in str(caught.value)


def test_rows_to_evaluate_on_are_looked_at_too(trainer):
    with pytest.raises(ConfigurationError, match="hold nothing to train on"):
        trainer(TEXT, eval_rows=[{"body": "words"}])


def test_streams_and_other_columns_pass():
    refuse_unreadable(None, "text")
    refuse_unreadable({"a": Dataset.from_list(TEXT), "b": Dataset.from_list([{"messages": []}])}, "text")
    refuse_unreadable(Dataset.from_list([{"body": "words"}]), "body")
    refuse_unreadable(IterableDataset.from_generator(lambda: iter(TEXT)), "text")
    refuse_too_short(IterableDataset.from_generator(lambda: iter(TEXT)))
    refuse_too_short(Dataset.from_list([{"input_ids": [5]}, {"input_ids": [6, 7]}]))
