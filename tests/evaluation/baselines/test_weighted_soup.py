"""A weighted soup computes each row with the average that the row's own beginning asks for."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError
from flexolmo_hf.evaluation.baselines import WeightedSoupForCausalLM, average_models
from flexolmo_hf.evaluation.bits_per_byte import bits_per_byte
from tests.conftest import dense_model
from tests.modeling.test_expert_sets import named_model

SETTINGS = {
    "sum": {"temperature": 20.0},
    "mean, top 2": {"loss": "mean", "temperature": 0.5, "top_k": 2},
}
EVERY_SETTING = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def members():
    return {name: dense_model(num_hidden_layers=1) for name in ("public", "math", "code")}


def soup(members, prefix=5, **settings):
    return WeightedSoupForCausalLM.from_members(members, prefix=prefix, **settings)


def weights_by_hand(members, row, *, prefix=5, temperature=1.0, loss="sum", top_k=None):
    """The members' weights for one row of tokens ``(1, T)``."""
    likelihood = []
    for member in members.values():
        given = member(row).logits.double().log_softmax(-1)[0, :-1].gather(1, row[0, 1:, None])[: prefix - 1]
        likelihood.append(float(given.sum() if loss == "sum" else given.mean()) / temperature)
    best = sorted(range(len(likelihood)), key=lambda index: -likelihood[index])[:top_k]
    raw = torch.tensor([v if i in best else -torch.inf for i, v in enumerate(likelihood)], dtype=torch.float64)
    return raw.softmax(0)


def by_hand(members, ids, prefix=5, **settings):
    plain, rows = average_models(members), []
    for row in ids.split(1):
        logits = plain(row).logits
        if row.shape[1] >= prefix:
            weights = weights_by_hand(members, row, prefix=prefix, **settings)
            own = average_models(list(members.values()), weights=weights.tolist())
            logits = torch.cat([logits[:, : prefix - 1], own(row).logits[:, prefix - 1 :]], dim=1)
        rows.append(logits)
    return torch.cat(rows)


@EVERY_SETTING
@torch.no_grad()
def test_logits_are_those_of_the_averages_computed_by_hand(members, input_ids, settings):
    model = soup(members, **settings)

    for row, weights_M in zip(input_ids.split(1), model.member_weights(input_ids), strict=True):
        torch.testing.assert_close(weights_M, weights_by_hand(members, row, **settings), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(input_ids).logits, by_hand(members, input_ids, **settings), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_soup_of_a_model_with_itself_is_that_model(members, input_ids):
    one = members["math"]

    # Rows are computed one by one, so sums may round otherwise.
    torch.testing.assert_close(soup({"a": one, "b": one, "c": one})(input_ids).logits, one(input_ids).logits)


@torch.no_grad()
def test_a_soup_of_mixtures_is_their_average(input_ids):
    members = {"one": named_model(2), "two": named_model(2)}
    settings = {"temperature": 20.0}

    logits = soup(members, **settings)(input_ids).logits
    torch.testing.assert_close(logits, by_hand(members, input_ids, **settings), rtol=1e-3, atol=1e-4)


@EVERY_SETTING
@torch.no_grad()
def test_no_token_settles_the_weights_that_score_it(members, input_ids, settings):
    model = soup(members, **settings)
    for column in range(1, 11):
        others = input_ids.clone()
        others[:, column:] = (others[:, column:] + 7) % 90 + 2

        assert torch.equal(model(input_ids).logits[:, :column], model(others).logits[:, :column])


@pytest.mark.parametrize("cuts", [[1] * 11, [3, 5, 3], [5, 6]], ids=str)
@EVERY_SETTING
@torch.no_grad()
def test_a_text_in_parts_with_a_cache_equals_the_text_in_one_call(members, input_ids, settings, cuts):
    model = soup(members, **settings)
    cache, parts = None, []
    for part in input_ids.split(cuts, dim=1):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)

    assert cache.get_seq_length() == 11
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_a_padded_row_gets_what_it_gets_alone(members, input_ids, side):
    model = soup(members, **SETTINGS["sum"])
    lengths = [11, 7, 3]
    ids, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = input_ids[row, :length], 1
    together = model(ids, attention_mask=mask).logits

    for row, length in enumerate(lengths):
        alone = model(input_ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_generation_uses_the_average_that_the_whole_prompt_asks_for(members, input_ids, beams):
    settings, options = SETTINGS["sum"], {"max_new_tokens": 3, "do_sample": False, "num_beams": beams}
    model = soup(members, **settings)
    mask, ids = torch.ones_like(input_ids), input_ids.clone()
    mask[1, :4] = ids[1, :4] = 0
    made = model.generate(ids, attention_mask=mask, **options)

    assert torch.equal(made, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for row, prompt in enumerate([input_ids[:1], input_ids[1:2, 4:], input_ids[2:]]):
        weights = weights_by_hand(members, prompt, prefix=prompt.shape[1], **settings)
        own = average_models(list(members.values()), weights=weights.tolist())
        assert torch.equal(made[row, 11:], own.generate(prompt, **options)[0, prompt.shape[1] :])


@torch.no_grad()
def test_assisted_decoding_changes_nothing(members, input_ids):
    model, options = soup(members, temperature=20.0), {"max_new_tokens": 5, "do_sample": False}
    plain = model.generate(input_ids[:1], **options)

    assert torch.equal(plain, model.generate(input_ids[:1], assistant_model=members["code"], **options))
    assert torch.equal(plain, model.generate(input_ids[:1], prompt_lookup_num_tokens=3, **options))


@pytest.mark.parametrize("columns", [2, 8], ids=["behind the prefix", "into the prefix"])
@torch.no_grad()
def test_what_is_taken_back_is_as_if_it_had_never_been_read(members, input_ids, columns):
    model = soup(members, **SETTINGS["sum"])
    cache = model(input_ids).past_key_values
    cache.crop(-columns)
    other = input_ids.flip(1)[:, :columns]
    expected = model(torch.cat([input_ids[:, :-columns], other], dim=1)).logits[:, -columns:]

    torch.testing.assert_close(model(other, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_follows_its_rows(members, input_ids):
    model = soup(members, **SETTINGS["sum"])
    filled, full = model(input_ids[:, :8]).past_key_values, model(input_ids).logits[:, 8:]

    for method, argument, rows in [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ]:
        cache = copy.deepcopy(filled)
        getattr(cache, method)(argument)
        logits = model(input_ids[rows, 8:], past_key_values=cache).logits
        torch.testing.assert_close(logits, full[rows], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_saved_soup_is_loaded_again(members, input_ids, tmp_path):
    model = soup(members, **SETTINGS["mean, top 2"])
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is WeightedSoupForCausalLM
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@torch.no_grad()
def test_bits_per_byte_do_not_depend_on_the_batch(tokenizer):
    members = {name: dense_model(vocab_size=len(tokenizer), num_hidden_layers=1) for name in ("public", "math")}
    model, texts = soup(members, temperature=20.0), ["one two three", "1 + 1", "a"]

    alone = sum(bits_per_byte(model, tokenizer, [text]).bits for text in texts)
    assert bits_per_byte(model, tokenizer, texts).bits == pytest.approx(alone, rel=1e-5)


def test_the_cost_is_that_of_the_members_and_one_average(members):
    size, cost = members["math"].num_parameters(), soup(members).cost()

    assert (cost.parameters, cost.parameters_per_token, cost.parameters_averaged) == (4 * size, size, 3 * size)
    assert (cost.passes_per_token, cost.passes_per_weight_token) == (1, 5)


@torch.no_grad()
def test_no_average_stays_with_a_cache_that_is_handed_back(members, input_ids):
    model, options = soup(members), {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    cache = model(input_ids[:, :8]).past_key_values
    assert cache.averaged is None
    assert model.generate(input_ids[:1], **options).past_key_values.averaged is None

    model(input_ids[:, 8:10], past_key_values=cache)
    model.generate(input_ids, past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert cache.get_seq_length() > 10
    assert cache.averaged is None


@torch.no_grad()
def test_a_prompt_that_was_read_before_is_continued_as_if_read_at_once(members, input_ids):
    model, options = soup(members, **SETTINGS["sum"]), {"max_new_tokens": 3, "do_sample": False}
    cache = model(input_ids[:, :10]).past_key_values

    later = model.generate(input_ids, past_key_values=cache, **options)
    assert torch.equal(later, model.generate(input_ids, weight_tokens=5, **options))


@pytest.mark.parametrize("kept", [3, 20])
@torch.no_grad()
def test_logits_to_keep_means_what_it_means_elsewhere(members, input_ids, kept):
    model = soup(members, **SETTINGS["sum"])
    full = model(input_ids).logits

    for ids in (input_ids, input_ids[:, :4]):
        torch.testing.assert_close(model(ids, logits_to_keep=kept).logits, full[:, : ids.shape[1]][:, -kept:])
    cache = model(input_ids[:, :3]).past_key_values
    later = model(input_ids[:, 3:], past_key_values=cache, logits_to_keep=kept).logits
    torch.testing.assert_close(later, full[:, 3:][:, -kept:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_cannot_be_meant_is_refused(members, input_ids, refused):
    with refused(ConfigurationError, "parameters"):
        soup({**members, "other": dense_model(intermediate_size=32, num_hidden_layers=1)})
    with refused(ConfigurationError, "'other'", "rms_norm_eps"):
        soup({**members, "other": dense_model(rms_norm_eps=0.1, num_hidden_layers=1)})
    model = soup(members)
    with refused(ConfigurationError, "weight_tokens has shape (2,) for 3 rows"):
        model(input_ids, weight_tokens=torch.tensor([3, 4]))
    with refused(ConfigurationError, "DynamicCache"):
        model(input_ids, past_key_values=DynamicCache())
    with refused(UnknownArgumentError, "active_experts"):
        model(input_ids, active_experts=["public"])
    cache = model(input_ids).past_key_values
    with refused(ConfigurationError, "weight_tokens"):
        model(input_ids, past_key_values=cache, weight_tokens=3)
    with refused(ConfigurationError, "crop(-12)"):
        cache.crop(-12)
