"""Each row of the opt-out matrix is what a checkpoint merged without the experts gives, bit for bit."""

import json

import pytest
from transformers import AutoModelForCausalLM

from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError, UnknownExpertError
from flexolmo_hf.evaluation.bits_per_byte import bits_by_document, bits_per_byte
from flexolmo_hf.evaluation.intervals import Interval, bootstrap_change
from flexolmo_hf.evaluation.optout import Change, opt_out_matrix
from tests.conftest import dense_model
from tests.evaluation.optout.models import TEXTS, byte_model, specialist
from tests.modeling.test_expert_sets import NAMES, poison

SIZES = {"max_length": 24, "batch_size": 3}


def values(matrix, label):
    return {data: [(d.bits, d.bytes, d.tokens) for d in found] for data, found in matrix.documents[label].items()}


@pytest.mark.parametrize(
    "changes",
    [{"num_hidden_layers": 1}, {"router_bias": True}, {"per_token": 2}, {"intermediate_size": 192}],
    ids=str,
)
def test_every_row_equals_a_separate_evaluation_of_a_checkpoint_without_the_expert(tmp_path, tokenizer, changes):
    byte_model(**changes).save_pretrained(tmp_path / "all")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "all")
    matrix = opt_out_matrix(model, tokenizer, TEXTS, subsets=["public+math"], **SIZES)

    assert list(matrix.sets) == ["all experts", *(f"without {name}" for name in NAMES), "public+math"]
    for label, names in matrix.sets.items():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "all", active_experts=names)
        loaded.save_pretrained(tmp_path / label)
        never = AutoModelForCausalLM.from_pretrained(tmp_path / label)
        assert never.config.expert_names == names
        for data, texts in TEXTS.items():
            alone = bits_by_document(never, tokenizer, texts, **SIZES)
            assert values(matrix, label)[data] == [(d.bits, d.bytes, d.tokens) for d in alone]
        assert matrix.keys[label] == never.expert_set_key()


def test_an_expert_of_nan_leaves_the_row_without_it_as_it_was(tokenizer):
    model = byte_model()
    before = opt_out_matrix(model, tokenizer, TEXTS, **SIZES)
    poison(model, ["code"])
    after = opt_out_matrix(model, tokenizer, TEXTS, **SIZES)

    assert values(after, "without code") == values(before, "without code")
    assert str(float(after.bits("without math", "math"))) == "nan"


def test_leaving_out_the_expert_that_helps_a_domain_costs_that_domain(tokenizer):
    matrix = opt_out_matrix(specialist("math"), tokenizer, TEXTS, **SIZES)

    assert matrix.change("without math", "math").value > 0.05
    assert matrix.change("without math", "math").is_clear
    assert matrix.change("without math", "math").value > matrix.change("without math", "verse").value
    assert [data for data in matrix.data if matrix.is_own("without math", data)] == ["math"]


def test_a_change_is_relative_to_all_experts_and_its_interval_is_paired(tokenizer):
    model = byte_model()
    matrix = opt_out_matrix(model, tokenizer, TEXTS, **SIZES)
    with model.use_experts("public", "code", "news"):
        without = bits_per_byte(model, tokenizer, TEXTS["math"], **SIZES)
    change = matrix.change("without math", "math")

    assert matrix.bits("without math", "math") == without
    assert change.value == without / bits_per_byte(model, tokenizer, TEXTS["math"], **SIZES) - 1
    assert change.interval == bootstrap_change(
        matrix.documents["without math"]["math"], matrix.documents["all experts"]["math"]
    )
    assert matrix.change("all experts", "math").value == 0


@pytest.mark.parametrize(
    ("low", "high", "clear"),
    [
        (0.01, 0.02, True),
        (-0.02, -0.01, True),
        (-0.01, 0.01, False),
        (0, 0.01, False),
        (-0.01, 0, False),
        (0, 0, False),
    ],
)
def test_a_change_is_clear_if_its_interval_does_not_hold_zero(low, high, clear):
    assert Change((low + high) / 2, Interval(low, high)).is_clear == clear


def test_experts_that_are_off_count_as_absent(tokenizer):
    model = byte_model()
    model.set_active_experts(["public", "math", "news"])
    poison(model, ["code"])
    matrix = opt_out_matrix(model, tokenizer, TEXTS, **SIZES)

    assert matrix.experts == ["public", "math", "news"]
    assert matrix.bits("all experts", "math") == bits_per_byte(model, tokenizer, TEXTS["math"], **SIZES)
    assert model.active_experts == ["public", "math", "news"]
    with pytest.raises(UnknownExpertError):
        opt_out_matrix(model, tokenizer, TEXTS, subsets=[["code"]], **SIZES)


def test_a_subset_that_leaves_out_one_expert_is_measured_once(tokenizer):
    matrix = opt_out_matrix(byte_model(), tokenizer, TEXTS, subsets=["news+public+math", NAMES], **SIZES)

    assert list(matrix.sets) == ["all experts", *(f"without {name}" for name in NAMES)]
    assert matrix.without("code") == "without code"


def test_of_two_experts_each_row_still_says_what_was_left_out(tokenizer):
    model = byte_model()
    model.set_active_experts(["public", "math"])

    assert opt_out_matrix(model, tokenizer, TEXTS, **SIZES).sets["without public"] == ["math"]


def test_progress_counts_each_batch_of_each_set_to_the_end(tokenizer):
    seen = []
    opt_out_matrix(byte_model(), tokenizer, {"math": TEXTS["math"]}, progress=lambda *at: seen.append(at), **SIZES)

    assert seen == [(done, len(seen)) for done in range(1, len(seen) + 1)]
    assert len(seen) % 5 == 0


def test_the_model_is_left_as_it_was_also_after_an_error(tokenizer):
    model = byte_model().train()
    state = [dict(module.__dict__) for module in model.modules()]

    def stop(done, total):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        opt_out_matrix(model, tokenizer, TEXTS, progress=stop, **SIZES)
    assert model.training
    assert [set(module.__dict__) for module in model.modules()] == [set(before) for before in state]


def test_empty_documents_are_left_out_and_an_empty_data_set_is_refused(tokenizer):
    model = byte_model()
    one = opt_out_matrix(model, tokenizer, {"math": ["", "1 + 1"]}, **SIZES)

    assert len(one.documents["all experts"]["math"]) == 1
    with pytest.raises(ConfigurationError, match="nothing to score in \\['verse'\\]"):
        opt_out_matrix(model, tokenizer, {"math": ["1"], "verse": ["", ""]}, **SIZES)
    with pytest.raises(ConfigurationError, match="nothing to score"):
        opt_out_matrix(model, tokenizer, {}, **SIZES)
    with pytest.raises(ConfigurationError, match="of 'math' are one string"):
        opt_out_matrix(model, tokenizer, {"math": "1 + 1"}, **SIZES)


def test_a_model_without_a_choice_is_refused(tokenizer):
    model = byte_model()
    model.set_active_experts(["math"])

    with pytest.raises(ConfigurationError, match="only expert in force is 'math'"):
        opt_out_matrix(model, tokenizer, TEXTS, **SIZES)
    with pytest.raises(NotFlexOlmoError, match="olmo2"):
        opt_out_matrix(dense_model(), tokenizer, TEXTS, **SIZES)


def test_without_a_length_windows_are_those_the_model_has_positions_for(tokenizer):
    model, data = byte_model(), {"math": ["1 + 1 = 2; " * 20]}
    found = opt_out_matrix(model, tokenizer, data)

    assert found.max_length == 128
    assert found.documents == opt_out_matrix(model, tokenizer, data, max_length=128).documents
    with pytest.raises(ConfigurationError, match="221 tokens, but the model has 128 positions"):
        opt_out_matrix(model, tokenizer, data, max_length=1024)


@pytest.mark.parametrize("sizes", [{"max_length": 1}, {"batch_size": 0}], ids=str)
def test_sizes_that_leave_nothing_to_score_are_refused(tokenizer, sizes):
    with pytest.raises(ConfigurationError, match="leave nothing to score"):
        opt_out_matrix(byte_model(), tokenizer, TEXTS, **sizes)


def test_the_matrix_holds_no_text(tokenizer):
    matrix = opt_out_matrix(byte_model(), tokenizer, TEXTS, **SIZES)

    shown = repr(matrix) + json.dumps(matrix.keys)
    assert [text for texts in TEXTS.values() for text in texts if len(text) > 4 and text in shown] == []
