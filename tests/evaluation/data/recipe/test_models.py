import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.recipe import read_recipe
from flexolmo_hf.evaluation.data.recipe.models import classifier, refuse_missing_models, rewriter
from flexolmo_hf.evaluation.data.recipe.schema import Classify, Rewrite
from tests.conftest import byte_tokenizer, dense_model

LABELS = {0: "News Article", 1: "Listicle"}


@pytest.fixture
def labelling(tmp_path):
    """A classifier that calls everything a news article, with a share of 0.9 (rounded)."""
    config = BertConfig(
        vocab_size=300,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
    )
    model = BertForSequenceClassification(config)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([2.2, 0.0]))
    model.save_pretrained(tmp_path / "CLASSIFIER")
    byte_tokenizer().save_pretrained(tmp_path / "CLASSIFIER")
    return str(tmp_path / "CLASSIFIER")


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"labels": ("News Article",)}, True),
        ({"labels": ("Listicle",)}, False),
        ({"but": ("News Article",)}, False),
        ({"but": ("Listicle",)}, True),
        ({"labels": ("News Article",), "min_score": 0.85}, True),
        ({"labels": ("News Article",), "min_score": 0.95}, False),
    ],
    ids=str,
)
def test_a_text_stays_if_its_label_is_wanted_and_sure_enough(labelling, settings, kept):
    assert classifier(Classify(model=labelling, max_length=8, **settings))("a text of more than eight tokens") == kept


def test_a_label_that_the_classifier_lacks_is_refused_with_the_nearest(labelling):
    with pytest.raises(ConfigurationError, match="Did you mean 'News Article'"):
        classifier(Classify(model=labelling, labels=("News Articles",)))


@pytest.fixture
def writing(tmp_path, tokenizer):
    dense_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "WRITER")
    tokenizer.save_pretrained(tmp_path / "WRITER")
    return str(tmp_path / "WRITER")


def test_a_text_is_rewritten_in_the_same_way_each_time_and_depends_on_the_text(writing):
    rewrite = rewriter(Rewrite(model=writing, prompt="Again {text}:", max_new_tokens=12))

    assert rewrite("one text") == rewrite("one text")
    assert rewrite("one text") != rewrite("quite another")


def test_the_text_is_put_into_the_prompt_and_cut_to_the_length_asked_for(writing):
    cut = rewriter(Rewrite(model=writing, prompt="Again {text}:", max_new_tokens=12, max_length=3))
    whole = rewriter(Rewrite(model=writing, prompt="Again {text}:", max_new_tokens=12))

    assert cut("one text") == whole("one")


@pytest.mark.parametrize(
    ("step", "settings"), [("rewrite", {"prompt": "Again {text}"}), ("classify", {"labels": ["News Article"]})]
)
def test_a_step_that_needs_a_model_is_refused_without_one(recipe, step, settings):
    with pytest.raises(ConfigurationError, match=f"asks to {step} the texts of 'problems' and names no model"):
        refuse_missing_models(read_recipe(recipe(**{step: settings})))


def test_a_recipe_without_such_steps_needs_no_model(recipe):
    refuse_missing_models(read_recipe(recipe()))


def test_a_model_that_cannot_be_had_is_refused_by_its_last_name(tmp_path):
    missing = str(tmp_path / "NOWHERE")

    with pytest.raises(ConfigurationError, match="no classifier 'NOWHERE'") as refused:
        classifier(Classify(model=missing, labels=("News Article",)))
    assert str(tmp_path) not in str(refused.value)
    with pytest.raises(ConfigurationError, match="no language model 'NOWHERE'"):
        rewriter(Rewrite(model=missing, prompt="Again {text}:"))
