"""A soup is the average of its members' weights, bit for bit theirs where they agree."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, Olmo2ForCausalLM

import flexolmo_hf.evaluation.baselines.soup as soup
from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import (
    ConfigurationError,
    EmptyExpertSetError,
    NonFiniteTensorError,
    NotFlexOlmoError,
    OutputFolderNotEmptyError,
)
from flexolmo_hf.evaluation.baselines import average_models
from tests.conftest import dense_model
from tests.modeling.test_expert_sets import named_model


@pytest.fixture
def models():
    return {name: dense_model() for name in ("public", "math", "code")}


@pytest.fixture
def folders(models, tokenizer, tmp_path):
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in models}


def by_hand(models, weights):
    states = [model.state_dict() for model in models]
    return {
        key: sum(weight * state[key].double() for weight, state in zip(weights, states, strict=True)).float()
        for key in states[0]
    }


def same(model, state):
    return all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())


def close(model, state):
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[key], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_soup_of_a_model_with_itself_is_that_model_bit_for_bit(dtype, tmp_path):
    model = dense_model().to(dtype)
    model.save_pretrained(tmp_path / "one")
    average_models([tmp_path / "one"] * 3, tmp_path / "out", weights=[0.3, 0.1, 0.7])

    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model.state_dict())
    assert same(average_models([model] * 3, weights=[0.3, 0.1, 0.7]), model.state_dict())


@pytest.mark.parametrize(
    ("weights", "shares"),
    [(None, [1 / 3] * 3), ([3, 1, 0], [0.75, 0.25, 0]), ({"code": 1, "public": 1, "math": 2}, [0.25, 0.5, 0.25])],
    ids=["equal", "in a row", "by name"],
)
def test_a_soup_is_the_weighted_average_computed_by_hand(models, folders, tmp_path, weights, shares):
    given = list(folders.values()) if isinstance(weights, list) else folders
    written = average_models(given, tmp_path / "out", weights=weights)
    expected = by_hand(models.values(), shares)

    loaded, report = Olmo2ForCausalLM.from_pretrained(written, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(loaded, expected)
    close(average_models(given, weights=weights), expected)


def test_folders_and_models_may_be_mixed(models, folders):
    close(average_models([folders["public"], models["math"]]), by_hand([models["public"], models["math"]], [0.5] * 2))


def test_the_tokenizer_and_the_settings_of_the_first_come_along(folders, tmp_path):
    average_models(folders, tmp_path / "out")

    for file in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        mine, first = (json.loads((folder / file).read_text()) for folder in (tmp_path / "out", folders["public"]))
        assert mine == first


def test_a_soup_of_mixtures_averages_their_experts_and_routers(input_ids, tmp_path):
    models = [named_model(), named_model()]
    for index, model in enumerate(models):
        model.save_pretrained(tmp_path / str(index))
    average_models([tmp_path / "0", tmp_path / "1"], tmp_path / "out")

    loaded = FlexOlmoForCausalLM.from_pretrained(tmp_path / "out", active_experts=["public", "math"])
    expected = by_hand(models, [0.5, 0.5])
    close(average_models(models), expected)
    assert loaded.expert_names == ["public", "math"]
    assert loaded(input_ids).logits.isfinite().all()
    assert len(list((tmp_path / "out").glob("model-expert-*.safetensors"))) == 4


def test_no_more_is_averaged_at_a_time_than_one_file_holds(folders, tmp_path, monkeypatch):
    made, held = [], []
    mean, save = soup.weighted_mean, soup.write_weights.__globals__["save_file"]
    monkeypatch.setattr(soup, "weighted_mean", lambda *a, **k: made.append(mean(*a, **k)) or made[-1])

    def saved(tensors, *args, **kwargs):
        held.append(sum(tensor.nbytes for tensor in made))
        made.clear()
        save(tensors, *args, **kwargs)

    monkeypatch.setitem(soup.write_weights.__globals__, "save_file", saved)
    average_models(folders, tmp_path / "out", max_shard_size=40_000)

    assert len(held) > 3
    assert max(held) <= 40_000


def test_what_does_not_fit_together_is_refused_before_anything_is_written(
    models, folders, tokenizer, tmp_path, refused
):
    out = tmp_path / "out"
    dense_model(num_hidden_layers=1).save_pretrained(tmp_path / "shallow")
    dense_model(rms_norm_eps=0.1).save_pretrained(tmp_path / "other")
    dense_model().to(torch.bfloat16).save_pretrained(tmp_path / "half")
    named_model().save_pretrained(tmp_path / "mixture")
    tokenizer.add_tokens("new")
    models["math"].save_pretrained(tmp_path / "words")
    tokenizer.save_pretrained(tmp_path / "words")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    first = folders["public"]

    for name, says in [
        ("shallow", "num_hidden_layers (2, 1)"),
        ("other", "rms_norm_eps"),
        ("half", "tensor(s) such as"),
        ("mixture", "model_type"),
        ("words", "the tokenizer"),
    ]:
        with refused(ConfigurationError, says):
            average_models([first, tmp_path / name], out)
    with refused(NotFlexOlmoError, "gpt2"):
        average_models([first, tmp_path / "foreign"], out)
    with refused(EmptyExpertSetError):
        average_models([], out)
    with refused(OutputFolderNotEmptyError, "math"):
        average_models([first], folders["math"])


@pytest.mark.parametrize("weights", [[1], [0, 0], [-1, 2], [float("nan"), 1]], ids=str)
def test_what_weighs_nothing_is_refused(models, weights, refused):
    with refused(ConfigurationError, "weigh"):
        average_models([models["public"], models["math"]], weights=weights)


def test_weights_of_other_members_are_refused(models, refused):
    with refused(ConfigurationError, "maht"):
        average_models(models, weights={"public": 1, "maht": 1, "code": 1})


def test_a_model_that_diverged_leaves_nothing_behind(models, folders, tmp_path, refused):
    models["code"].lm_head.weight.data[0, 0] = float("nan")
    models["code"].save_pretrained(folders["code"])
    with refused(NonFiniteTensorError, "lm_head.weight"):
        average_models(folders, tmp_path / "out")
    with refused(NonFiniteTensorError, "lm_head.weight"):
        average_models(models)
