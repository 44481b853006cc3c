"""Data that hold nothing to train on are refused, and the message holds nothing of them."""

import pytest
from datasets import Dataset, IterableDataset

from flexolmo_hf import ExpertDPOConfig, ExpertDPOTrainer, ExpertGRPOConfig, ExpertGRPOTrainer
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.trainers.rows import refuse_lacking, refuse_too_short, text_columns
from tests.trainers.conftest import TEXT


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"body": "private words"}], "'text', or 'prompt' and 'completion', or 'messages'"),
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


def preferring(model, folder, **data):
    return ExpertDPOTrainer(model, ExpertDPOConfig(expert="math", output_dir=str(folder), bf16=False), **data)


def rewarding(model, folder, **data):
    args = ExpertGRPOConfig(expert="math", output_dir=str(folder), bf16=False)
    return ExpertGRPOTrainer(model, lambda completions, **kwargs: [0.0] * len(completions), args, **data)


@pytest.mark.parametrize(
    ("rows", "messages"),
    [
        ([], dict.fromkeys([preferring, rewarding], "empty")),
        ([{"text": "private words"}], {preferring: "needs 'chosen' and 'rejected'", rewarding: "needs 'prompt'"}),
    ],
    ids=["empty", "other columns"],
)
@pytest.mark.parametrize("make", [preferring, rewarding])
@pytest.mark.parametrize("which", ["train_dataset", "eval_dataset"])
def test_preferences_and_rewards_refuse_such_data_before_anything_is_made_of_the_model(
    model, tmp_path, make, rows, messages, which
):
    good = Dataset.from_list([{"prompt": "p", "chosen": "c", "rejected": "r"}])
    with pytest.raises(ConfigurationError, match=messages[make]) as caught:
        make(model, tmp_path / "run", **{"train_dataset": good, which: Dataset.from_list(rows)})
    assert "private" not in str(caught.value)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not (tmp_path / "run").exists()


def test_rows_that_a_function_of_the_caller_makes_into_text_need_no_column(model, settings, tokenizer):
    from flexolmo_hf import ExpertSFTTrainer

    run = ExpertSFTTrainer(
        model=model,
        args=settings(max_steps=1),
        train_dataset=Dataset.from_list([{"body": "some words"}] * 4),
        formatting_func=lambda row: row["body"],
        processing_class=tokenizer,
    )
    run.train()
    assert run.state.global_step == 1


def test_streams_and_other_columns_pass():
    refuse_lacking(Dataset.from_list([{"body": "words"}]), [])
    refuse_lacking(None, text_columns("text"))
    refuse_lacking({"a": Dataset.from_list(TEXT), "b": Dataset.from_list([{"messages": []}])}, text_columns("text"))
    refuse_lacking(Dataset.from_list([{"body": "words"}]), text_columns("body"))
    refuse_lacking(IterableDataset.from_generator(lambda: iter(TEXT)), text_columns("text"))
    refuse_too_short(IterableDataset.from_generator(lambda: iter(TEXT)))
    refuse_too_short(Dataset.from_list([{"input_ids": [5]}, {"input_ids": [6, 7]}]))
