"""What is settled by the beginning of a text is told where the prompt ends, by the argument that its forward takes."""

import inspect

import pytest

from flexolmo_hf.evaluation.baselines import (
    BranchTrainMergeForCausalLM,
    PromptRoutedForCausalLM,
    WeightedSoupForCausalLM,
)
from tests.conftest import dense_model
from tests.evaluation.baselines.chat import chat_model
from tests.evaluation.baselines.test_prompt_routing import LABELS


@pytest.fixture
def members(tokenizer):
    return {name: dense_model(vocab_size=len(tokenizer), num_hidden_layers=1) for name in ("public", "math")}


def test_each_prompt_settles_its_own_row_and_a_text_without_one_keeps_the_default(tokenizer, members):
    models = {
        "weight_tokens": [
            WeightedSoupForCausalLM.from_members(members, prefix=7),
            BranchTrainMergeForCausalLM.from_members(members, weights_from="prefix", prefix=7),
        ],
        "query_tokens": [
            PromptRoutedForCausalLM.from_models(members, tokenizer, labels=LABELS, chat=chat_model(), prefix=7)
        ],
    }
    for argument, model in ((argument, model) for argument, own in models.items() for model in own):
        options = model.prompt_options([3, 0, 90])

        assert {name: value.tolist() for name, value in options.items()} == {argument: [3, 7, 90]}
        assert argument in inspect.signature(model.forward).parameters


def test_an_ensemble_that_weighs_token_by_token_is_told_nothing(members):
    model = BranchTrainMergeForCausalLM.from_members(members)

    assert model.prompt_argument is None
    assert model.prompt_options([3, 0]) == {}
