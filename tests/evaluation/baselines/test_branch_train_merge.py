"""Branch-train-merge mixes distributions by what members have predicted, however a text is cut or padded."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError
from flexolmo_hf.evaluation.baselines import BranchTrainMergeForCausalLM
from flexolmo_hf.evaluation.baselines.members_cache import MembersCache
from flexolmo_hf.evaluation.bits_per_byte import bits_per_byte
from tests.conftest import dense_model

SETTINGS = {
    "running": {},
    "running, sum, top 2": {"loss": "sum", "temperature": 7.0, "top_k": 2},
    "prefix, sum": {"weights_from": "prefix", "prefix": 4, "loss": "sum"},
    "prefix, top 1": {"weights_from": "prefix", "prefix": 5, "top_k": 1},
}
EVERY_SETTING = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)


@pytest.fixture
def members():
    # Of different sizes: nothing but the vocabulary is shared.
    sizes = {"public": 48, "math": 32, "code": 64}
    return {name: dense_model(intermediate_size=size, num_hidden_layers=1) for name, size in sizes.items()}


def merged(members, **settings):
    return BranchTrainMergeForCausalLM.from_members(members, **settings)


def by_hand(
    members, ids, *, temperature=1.0, top_k=None, weights_from="running", prefix=64, loss="mean", weight_tokens=None
):
    """The log-probabilities of each token to come, in loops over rows, tokens and members."""
    prefix = weight_tokens or prefix
    predicted = [member(ids).logits.double().log_softmax(-1) for member in members.values()]
    out = torch.zeros_like(predicted[0])
    for row, tokens in enumerate(ids.tolist()):
        for column in range(len(tokens)):
            read = column + 1
            if weights_from == "prefix":
                read = prefix if read >= prefix else 0
            weights = [1 / len(predicted)] * len(predicted)
            if read > 1:
                losses = [-sum(float(p[row, t - 1, tokens[t]]) for t in range(1, read)) for p in predicted]
                if loss == "mean":
                    losses = [value / (read - 1) for value in losses]
                best = sorted(range(len(losses)), key=lambda index: losses[index])[:top_k]
                raw = [math.exp(-v / temperature) if i in best else 0.0 for i, v in enumerate(losses)]
                weights = [value / sum(raw) for value in raw]
            mixed = sum(w * p[row, column].exp() for w, p in zip(weights, predicted, strict=True))
            out[row, column] = mixed.log()
    return out.float()


@EVERY_SETTING
@torch.no_grad()
def test_logits_are_the_mixed_probabilities_computed_by_hand(members, input_ids, settings):
    logits = merged(members, **settings)(input_ids).logits

    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, by_hand(members, input_ids, **settings), rtol=1e-4, atol=1e-4)


@EVERY_SETTING
@torch.no_grad()
def test_one_member_is_that_member(members, input_ids, settings):
    alone = members["math"]
    model = merged({"math": alone}, **settings)

    torch.testing.assert_close(model(input_ids).logits, alone(input_ids).logits.log_softmax(-1))
    assert torch.equal(
        model.generate(input_ids, max_new_tokens=3, do_sample=False),
        alone.generate(input_ids, max_new_tokens=3, do_sample=False),
    )


@EVERY_SETTING
@torch.no_grad()
def test_no_token_is_weighed_by_itself_or_by_what_follows(members, input_ids, settings):
    model = merged(members, **settings)
    others = input_ids.clone()
    others[:, 6:] = (others[:, 6:] + 7) % 90 + 2

    before, after = model(input_ids).logits, model(others).logits

    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("cuts", [[1] * 11, [4, 1, 6]], ids=str)
@EVERY_SETTING
@torch.no_grad()
def test_a_text_in_parts_with_a_cache_equals_the_text_in_one_call(members, input_ids, settings, cuts):
    model = merged(members, **settings)
    cache, parts = None, []
    for part in input_ids.split(cuts, dim=1):
        outputs = model(part, past_key_values=cache, use_cache=True)
        cache = outputs.past_key_values
        parts.append(outputs.logits)

    assert cache.get_seq_length() == 11
    torch.testing.assert_close(torch.cat(parts, dim=1), model(input_ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
@EVERY_SETTING
def test_generation_with_a_cache_equals_generation_without(members, input_ids, settings, beams):
    model = merged(members, **settings)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}

    assert torch.equal(model.generate(input_ids, **options), model.generate(input_ids, use_cache=False, **options))


@pytest.mark.parametrize("side", ["left", "right"])
@EVERY_SETTING
@torch.no_grad()
def test_a_padded_row_gets_what_it_gets_alone(members, input_ids, settings, side):
    model = merged(members, **settings)
    lengths = [11, 7, 3]
    ids, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        place = slice(11 - length, 11) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = input_ids[row, :length], 1
    together = model(ids, attention_mask=mask).logits

    for row, length in enumerate(lengths):
        alone = model(input_ids[row : row + 1, :length]).logits[0]
        torch.testing.assert_close(together[row][mask[row].bool()], alone, rtol=1e-4, atol=1e-4)


@EVERY_SETTING
def test_a_prompt_padded_on_the_left_is_continued_as_it_is_alone(members, input_ids, settings):
    model = merged(members, **settings)
    mask = torch.ones_like(input_ids)
    mask[1, :5], ids = 0, input_ids.clone()
    ids[1, :5] = 0
    options = {"max_new_tokens": 4, "do_sample": False}
    together = model.generate(ids, attention_mask=mask, **options)

    assert torch.equal(together[1, 11:], model.generate(input_ids[1:2, 5:], **options)[0, 6:])


@torch.no_grad()
def test_the_whole_prompt_settles_the_weights_of_what_is_generated(members, input_ids):
    settings = {"weights_from": "prefix", "prefix": 3, "top_k": 2}
    model = merged(members, **settings)
    made = model.generate(
        input_ids, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )

    expected = by_hand(members, made.sequences[:, :-1], weight_tokens=11, **settings)
    torch.testing.assert_close(torch.stack(made.logits, dim=1), expected[:, 10:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_members_that_weigh_nothing_are_not_run(members, input_ids):
    model = merged(members, weights_from="prefix", prefix=5, top_k=1)
    tokens_run = dict.fromkeys(members, 0)
    for name, member in members.items():
        member.register_forward_pre_hook(
            lambda _, __, kwargs, name=name: tokens_run.update({name: tokens_run[name] + kwargs["input_ids"].shape[1]}),
            with_kwargs=True,
        )
    outputs = model(input_ids[:1])
    model(input_ids[:1, :2], past_key_values=outputs.past_key_values)

    assert sorted(tokens_run.values()) == [5, 5, 13]


@EVERY_SETTING
def test_assisted_decoding_takes_back_drafts_and_changes_nothing(members, input_ids, settings):
    model = merged(members, **settings)
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = model.generate(input_ids[:1], **options)

    assert torch.equal(plain, model.generate(input_ids[:1], assistant_model=members["code"], **options))
    assert torch.equal(plain, model.generate(input_ids[:1], prompt_lookup_num_tokens=3, **options))


@EVERY_SETTING
@torch.no_grad()
def test_what_is_taken_back_is_as_if_it_had_never_been_read(members, input_ids, settings):
    model = merged(members, **settings)
    cache = MembersCache(model.members)
    cache.activate_past_recording()
    model(input_ids, past_key_values=cache)
    cache.crop(-3)
    other = input_ids.flip(1)[:, :3]
    expected = model(torch.cat([input_ids[:, :-3], other], dim=1)).logits[:, -3:]

    torch.testing.assert_close(model(other, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-5)


@EVERY_SETTING
@torch.no_grad()
def test_a_cache_follows_its_rows(members, input_ids, settings):
    model = merged(members, **settings)
    filled = model(input_ids[:, :8]).past_key_values
    new = input_ids[:, 8:]
    full = model(input_ids).logits[:, 8:]

    for method, argument, rows in [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ]:
        cache = copy.deepcopy(filled)
        getattr(cache, method)(argument)
        logits = model(new[rows], past_key_values=cache).logits
        torch.testing.assert_close(logits, full[rows], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cache_that_was_reset_begins_anew(members, input_ids):
    model = merged(members)
    cache = model(input_ids).past_key_values
    cache.reset()

    assert torch.equal(model(input_ids, past_key_values=cache).logits, model(input_ids).logits)


@EVERY_SETTING
@torch.no_grad()
def test_saved_members_are_loaded_again_from_safetensors_alone(members, input_ids, settings, tmp_path):
    model = merged(members, **settings)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert type(loaded) is BranchTrainMergeForCausalLM
    assert sorted(path.name for path in tmp_path.glob("member-*")) == ["member-code", "member-math", "member-public"]
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".json", ".safetensors"}
    assert {key: getattr(loaded.config, key) for key in settings} == settings
    assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)


@torch.no_grad()
def test_settings_and_dtype_can_be_given_when_loading(members, input_ids, tmp_path):
    merged(members).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, top_k=1, dtype=torch.bfloat16)

    assert loaded.config.top_k == 1
    assert loaded.dtype == torch.bfloat16
    assert loaded(input_ids).logits.dtype == torch.float32


def test_the_temperature_of_the_mixture_is_not_that_of_sampling(members, tmp_path):
    model = merged(members, temperature=0.2, top_k=1)
    model.save_pretrained(tmp_path)

    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert (one.generation_config.temperature, one.generation_config.top_k) == (None, None)


@torch.no_grad()
def test_members_may_be_mixtures(input_ids):
    dense = dense_model()
    flex = FlexOlmoForCausalLM.from_dense(dense, expert="math")
    model = merged({"dense": dense, "flex": flex}, temperature=0.5)

    torch.testing.assert_close(
        model(input_ids).logits, by_hand(dict(model.named_members()), input_ids, temperature=0.5)
    )
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(input_ids, **options), model.generate(input_ids, use_cache=False, **options))


@EVERY_SETTING
@torch.no_grad()
def test_logits_to_keep_and_labels_mean_what_they_mean_elsewhere(members, input_ids, settings):
    model = merged(members, **settings)
    full = model(input_ids, labels=input_ids)

    assert torch.equal(model(input_ids, logits_to_keep=4).logits, full.logits[:, -4:])
    assert torch.equal(model(input_ids, logits_to_keep=torch.tensor([2, 9])).logits, full.logits[:, [2, 9]])
    by_hand_loss = -full.logits[:, :-1].gather(2, input_ids[:, 1:, None]).mean()
    torch.testing.assert_close(full.loss, by_hand_loss)


@EVERY_SETTING
@torch.no_grad()
def test_bits_per_byte_are_those_computed_by_hand(tokenizer, settings):
    members = {name: dense_model(vocab_size=len(tokenizer), num_hidden_layers=1) for name in ("public", "math")}
    texts = ["one two three", "1 + 1 = 2"]
    bits = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        logits = by_hand(members, ids, **settings)
        bits -= float(logits[0, :-1].gather(1, ids[0, 1:, None]).sum()) / math.log(2)

    measured = bits_per_byte(merged(members, **settings), tokenizer, texts)
    assert measured == pytest.approx(bits / sum(map(len, texts)), rel=1e-4)


@torch.no_grad()
def test_lm_eval_scores_it(tokenizer):
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    members = {name: dense_model(vocab_size=len(tokenizer), num_hidden_layers=1) for name in ("public", "math")}
    model = merged(members)
    harness = huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    pairs = [("two and two", " are four"), ("a", " b c")]
    requests = [instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]

    for (score, _), (context, rest) in zip(harness.loglikelihood(requests), pairs, strict=True):
        ids = torch.tensor([tokenizer(context + rest)["input_ids"]])
        logits = by_hand(members, ids)[0, :-1].gather(1, ids[0, 1:, None])[-len(rest) :]
        assert score == pytest.approx(float(logits.sum()), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "run"), [({}, 3), ({"top_k": 2}, 3), ({"top_k": 2, "weights_from": "prefix"}, 2)], ids=str
)
def test_the_cost_counts_every_member_that_is_run(members, settings, run):
    cost = merged(members, **settings).cost()
    sizes = sorted(member.num_parameters() for member in members.values())

    assert cost.parameters == sum(sizes)
    assert cost.parameters_per_token == sum(sizes[-run:])
    assert (cost.passes_per_token, cost.passes_per_weight_token) == (run, 3)


def test_what_cannot_be_meant_is_refused(members, input_ids, refused):
    for settings, says in [
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"top_k": 0}, "top_k=0"),
        ({"prefix": 1}, "prefix=1"),
        ({"loss": "max"}, "loss='max'"),
        ({"weights_from": "nothing"}, "weights_from='nothing'"),
    ]:
        with refused(ConfigurationError, says):
            merged(members, **settings)
    model = merged(members)
    with refused(ConfigurationError, "weight_tokens"):
        model(input_ids, weight_tokens=3)
    with refused(ConfigurationError, "DynamicCache"):
        model(input_ids, past_key_values=DynamicCache())
    with refused(ConfigurationError, "attention_mask", "(3, 1, 11, 11)"):
        model(input_ids, attention_mask=torch.ones(3, 1, 11, 11))
    with refused(UnknownArgumentError, "active_experts"):
        model(input_ids, active_experts=["public"])
    with refused(ConfigurationError, "static"):
        model.generate(input_ids, cache_implementation="static", max_new_tokens=2)


@torch.no_grad()
def test_no_more_is_taken_back_than_is_remembered(members, input_ids, refused):
    model = merged(members)
    cache = model(input_ids).past_key_values
    for columns in (1, -1, -12):
        with refused(ConfigurationError, f"crop({columns})"):
            cache.crop(columns)
    cache.crop(0)

    assert cache.get_seq_length() == 11
