"""Attribution tells what the mixtures really multiplied by: no more, no less, and at next to no cost."""

import copy
import json
import pickle
import statistics
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BatchEncoding
from transformers.utils import output_capturing

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, ExpertNotLoadedError, ExpertRowsError, UnknownExpertError
from tests.conftest import TINY
from tests.modeling.test_expert_sets import NAMES, named_model, poison

PER_TOKEN = pytest.mark.parametrize("per_token", [4, 2, 1], ids=["all of 4", "2 of 4", "1 of 4"])
SUBSET, ROWS = ["public", "math", "news"], [["public"], ["code", "math", "news"], ["math", "public"]]
SETS = pytest.mark.parametrize("sets", [None, SUBSET, ROWS], ids=["all", "set", "rows"])
#: Left padding for the three rows of `input_ids`.
PADDING = (0, 4, 2)


def padded(input_ids):
    mask = torch.ones_like(input_ids)
    for row, padding in enumerate(PADDING):
        mask[row, :padding] = 0
    return input_ids.masked_fill(mask == 0, TINY["pad_token_id"]), mask


@contextmanager
def listening(model):
    """Collect what goes into and comes out of each layer's mixture."""
    heard = []
    with ExitStack() as hooks:
        for mixture in model.mixtures:
            hooks.enter_context(mixture.register_forward_hook(lambda _, args, out: heard.append((args[0], out))))
        yield heard


def by_hand(model, hidden_TH, layer, names):
    """Weigh one row's tokens one by one, in plain arithmetic: ``(T, 4)`` over all experts."""
    gate, positions = model.mixtures[layer].gate, [NAMES.index(name) for name in names]
    weights = torch.zeros(len(hidden_TH), len(NAMES))
    for token, hidden in enumerate(hidden_TH):
        scores = [float(torch.exp(hidden @ gate.weight[p] + _bias(gate, p))) for p in positions]
        best = sorted(range(len(positions)), key=lambda i: -scores[i])[: model.config.num_experts_per_tok]
        total = sum(scores[i] for i in best) if model.config.norm_topk_prob else sum(scores)
        for i in best:
            weights[token, positions[i]] = scores[i] / total
    return weights


def _bias(gate, position):
    return 0.0 if gate.bias is None else min(float(gate.bias[position]), 0.0)


@SETS
@PER_TOKEN
@pytest.mark.parametrize("settings", [{}, {"norm_topk_prob": True}, {"router_bias": True}], ids=["", "normed", "bias"])
@torch.no_grad()
def test_weights_are_those_worked_out_by_hand(input_ids, sets, per_token, settings):
    model = named_model(per_token, **settings)
    with listening(model) as heard:
        found = model.attribution(input_ids, active_experts=sets)

    assert found.experts == (SUBSET if sets is SUBSET else NAMES)
    columns = [NAMES.index(name) for name in found.experts]
    rows = sets if sets is ROWS else [found.experts] * 3
    for layer, (hidden_BTH, _) in enumerate(heard):
        for row, names in enumerate(rows):
            want = by_hand(model, hidden_BTH[row], layer, names)[:, columns]
            torch.testing.assert_close(found.weights[row, :, layer], want, atol=1e-5, rtol=0)


@SETS
@PER_TOKEN
@pytest.mark.parametrize("way", ["auto", "dense", "eager", "grouped_mm"])
@torch.no_grad()
def test_the_experts_outputs_times_the_weights_are_what_the_mixture_returns(input_ids, sets, per_token, way):
    model = named_model(per_token, norm_topk_prob=True)
    model.set_experts_implementation(way)
    with listening(model) as heard:
        found = model.attribution(input_ids, active_experts=sets)
    for layer, (hidden_BTH, output_BTH) in enumerate(heard):
        experts = [model.expert_modules(name)[layer] for name in found.experts]
        mixed = sum(expert(hidden_BTH) * found.weights[:, :, layer, i, None] for i, expert in enumerate(experts))
        torch.testing.assert_close(mixed, output_BTH, atol=1e-5, rtol=1e-5)


@PER_TOKEN
@torch.no_grad()
def test_bfloat16_weights_are_those_that_bfloat16_multiplies_by(input_ids, per_token):
    model = named_model(per_token).to(torch.bfloat16)
    with listening(model) as heard:
        found = model.attribution(input_ids)
    weights = found.weights

    assert weights.dtype == torch.float32
    assert torch.equal(weights, weights.bfloat16().float())
    assert sum(found.shares.values()) == pytest.approx(1, abs=1e-6)
    for layer, (hidden_BTH, output_BTH) in enumerate(heard):
        experts = [model.expert_modules(name)[layer] for name in NAMES]
        mixed = sum(expert(hidden_BTH) * weights[:, :, layer, i, None] for i, expert in enumerate(experts))
        torch.testing.assert_close(mixed, output_BTH.float(), atol=2e-2, rtol=2e-2)


@SETS
@PER_TOKEN
def test_shares_are_means_over_tokens_and_layers_that_sum_to_one(input_ids, sets, per_token):
    ids, mask = padded(input_ids)
    found = named_model(per_token).attribution(ids, mask, active_experts=sets)
    share_of_each = found.weights / found.weights.sum(-1, keepdim=True)
    real = mask.bool()

    assert found.tokens == sum(11 - padding for padding in PADDING)
    assert list(found.shares.values()) == pytest.approx(share_of_each[real].mean((0, 1)).tolist(), abs=1e-6)
    for row, shares in enumerate(found.shares_per_row):
        assert list(shares.values()) == pytest.approx(share_of_each[row][real[row]].mean((0, 1)).tolist(), abs=1e-6)
    for layer, shares in enumerate(found.shares_per_layer):
        assert list(shares.values()) == pytest.approx(share_of_each[real][:, layer].mean(0).tolist(), abs=1e-6)
    for shares in (found.shares, *found.shares_per_row, *found.shares_per_layer):
        assert list(shares) == found.experts
        assert sum(shares.values()) == pytest.approx(1, abs=1e-6)


@PER_TOKEN
def test_one_expert_alone_has_the_whole_share(input_ids, per_token):
    found = named_model(per_token).attribution(input_ids, active_experts=["code"])

    assert found.shares == {"code": 1.0}
    assert found.weights.eq(1).all()


def test_a_row_has_no_share_of_what_it_may_not_use(input_ids):
    found = named_model(2).attribution(input_ids, active_experts=ROWS)

    assert found.shares_per_row[0] == {"public": 1.0, "math": 0.0, "code": 0.0, "news": 0.0}
    assert found.shares_per_row[1]["public"] == 0
    assert found.shares_per_row[1]["news"] > 0


@SETS
@PER_TOKEN
@pytest.mark.parametrize("chunk_size", [1, 4, 10])
def test_pieces_give_what_one_pass_gives(input_ids, sets, per_token, chunk_size):
    ids, mask = padded(input_ids)
    model = named_model(per_token)
    for chosen_mask in (None, mask):
        whole = model.attribution(ids, chosen_mask, active_experts=sets)
        pieces = model.attribution(ids, chosen_mask, active_experts=sets, chunk_size=chunk_size)
        torch.testing.assert_close(pieces.weights, whole.weights, atol=1e-6, rtol=0)
        assert pieces.shares == pytest.approx(whole.shares, abs=1e-6)


def test_no_more_than_a_piece_runs_at_once(input_ids):
    model = named_model()
    with listening(model) as heard:
        model.attribution(input_ids, chunk_size=4)

    assert [hidden_BTH.shape[1] for hidden_BTH, _ in heard] == [4, 4, 4, 4, 3, 3]


@SETS
@PER_TOKEN
def test_padding_changes_nothing_and_has_no_weight(input_ids, sets, per_token):
    ids, mask = padded(input_ids)
    model = named_model(per_token)
    found = model.attribution(ids, mask, active_experts=sets)
    for row, padding in enumerate(PADDING):
        names = sets[row] if sets is ROWS else sets
        alone = model.attribution(ids[row, padding:], active_experts=names)
        columns = [found.experts.index(name) for name in alone.experts]
        torch.testing.assert_close(found.weights[row, padding:][..., columns], alone.weights[0], atol=1e-5, rtol=0)
        assert not found.weights[row, :padding].any()
        shares = {name: found.shares_per_row[row][name] for name in alone.experts}
        assert shares == pytest.approx(alone.shares, abs=1e-5)


def test_shares_alone_are_the_same_without_the_weights(input_ids):
    model = named_model(2)
    found, whole = model.attribution(input_ids, per_token=False, chunk_size=4), model.attribution(input_ids)

    assert found.weights is None
    assert found.shares == pytest.approx(whole.shares, abs=1e-6)


@PER_TOKEN
def test_inactive_experts_leave_no_trace(input_ids, per_token):
    model = named_model(per_token)
    before = model.attribution(input_ids, active_experts=["public", "math"])
    poison(model, ["code", "news"])
    after = model.attribution(input_ids, active_experts=["public", "math"])

    assert before.experts == after.experts == ["public", "math"]
    assert torch.equal(before.weights, after.weights)
    assert before.shares == after.shares


@PER_TOKEN
def test_an_expert_leaves_no_trace_in_rows_that_may_not_use_it(input_ids, per_token):
    model = named_model(per_token)
    before = model.attribution(input_ids, active_experts=ROWS)
    poison(model, ["code"])
    after = model.attribution(input_ids, active_experts=ROWS)

    assert torch.equal(before.weights[[0, 2]], after.weights[[0, 2]])
    assert [after.shares_per_row[row] for row in (0, 2)] == [before.shares_per_row[row] for row in (0, 2)]
    assert after.weights[1].isnan().any()


def test_the_set_in_force_is_meant_where_none_is_given(input_ids):
    model = named_model(2)
    want = model.attribution(input_ids, active_experts=SUBSET)
    with model.use_experts(*SUBSET):
        found = model.attribution(input_ids)

    assert found.experts == SUBSET
    assert torch.equal(found.weights, want.weights)


def test_columns_of_a_partial_load_are_the_experts_in_memory(tmp_path, input_ids):
    model = named_model(2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["public", "news"])
    want = model.attribution(input_ids, active_experts=["public", "news"])

    assert loaded.attribution(input_ids).experts == ["public", "news"]
    assert torch.equal(loaded.attribution(input_ids).weights, want.weights)
    with pytest.raises(ExpertNotLoadedError):
        loaded.attribution(input_ids, active_experts=["math"])


def test_ids_of_one_row_may_come_without_a_batch(input_ids):
    model = named_model()

    assert torch.equal(model.attribution(input_ids[0]).weights, model.attribution(input_ids[:1]).weights)


def test_what_a_tokenizer_returns_is_read_with_its_mask(input_ids):
    ids, mask = padded(input_ids)
    inputs = BatchEncoding({"input_ids": ids, "attention_mask": mask})
    model = named_model()
    want = model.attribution(ids, mask)

    assert torch.equal(model.attribution(inputs).weights, want.weights)
    assert torch.equal(model.attribution(**inputs).weights, want.weights)


@pytest.mark.parametrize("beams", [1, 3])
def test_an_output_of_generate_is_read_as_its_sequences(input_ids, beams):
    model = named_model(2)
    model.generation_config.eos_token_id = None
    output = model.generate(
        input_ids, max_new_tokens=5, do_sample=False, num_beams=beams, return_dict_in_generate=True, output_scores=True
    )
    found = model.attribution(output)

    assert found.tokens == 3 * 16
    assert torch.equal(found.weights, model.attribution(output.sequences).weights)


def test_a_generated_text_routes_as_it_did_while_it_was_generated(input_ids):
    ids, mask = padded(input_ids)
    model = named_model(2)
    recorded = []
    hook = model.mixtures[1].gate.register_forward_hook(lambda _, args, out: recorded.append(out[1]))
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, do_sample=False, return_dict_in_generate=True
    )
    hook.remove()
    probs_BTE = torch.cat(recorded, dim=1)
    want = probs_BTE.where(probs_BTE >= probs_BTE.topk(2).values[..., 1:], 0)
    found = model.attribution(output, mask).weights[:, :-1, 1]
    real = torch.cat([mask, mask.new_ones(3, 4)], dim=1).bool()

    torch.testing.assert_close(found[real], want[real], atol=1e-5, rtol=0)


def test_tokens_after_padding_stand_where_generate_puts_them(input_ids):
    ids, mask = padded(input_ids)
    model = named_model()
    seen = []
    hook = model.model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    model.generate(ids, attention_mask=mask, max_new_tokens=1)
    model.attribution(ids, mask, chunk_size=4)
    hook.remove()

    assert torch.equal(torch.cat(seen[1:], dim=1), seen[0])


def test_the_head_is_never_called(input_ids):
    model = named_model()
    want = model.attribution(input_ids)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    model.lm_head.forward = None

    assert torch.equal(model.attribution(input_ids).weights, want.weights)


class Counting(TorchDispatchMode):
    """Count the operations that run, by name, and those that multiply matrices."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))

    @property
    def products(self):
        return sorted(name for name in self.names if "mm" in name or "attention" in name or "bmm" in name)


@PER_TOKEN
def test_it_costs_a_forward_pass_and_a_few_operations_whatever_the_number_of_layers(input_ids, per_token):
    extra = []
    for layers in (2, 5):
        model = named_model(per_token, num_hidden_layers=layers)
        model.attribution(input_ids)
        with torch.no_grad(), Counting() as plain:
            model.model(input_ids, use_cache=False)
        with Counting() as counted:
            model.attribution(input_ids)
        assert counted.products == plain.products != []
        extra.append(len(counted.names) - len(plain.names))

    assert extra[0] == extra[1] < 60


def test_an_error_half_way_leaves_nothing_behind(input_ids, monkeypatch):
    model = named_model().train()
    model.attribution(input_ids)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    expert = model.expert_modules("math")[1]
    with monkeypatch.context() as patch:
        patch.setattr(type(expert), "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.attribution(input_ids)

    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert output_capturing._active_collector.get() is None
    assert all(module.training for module in model.modules())
    assert model(input_ids).router_logits is None


def test_router_logits_keep_their_meaning(input_ids):
    model = named_model(2)
    before = model(input_ids, output_router_logits=True).router_logits
    model.attribution(input_ids)
    after = model(input_ids, output_router_logits=True).router_logits

    assert [tuple(logits.shape) for logits in after] == [(33, 4)] * 2
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))


def test_threads_that_share_a_model_each_get_their_own(input_ids):
    model = named_model(2)
    jobs = [(input_ids[:, :n], sets) for n, sets in [(11, None), (7, SUBSET), (9, ["code"]), (11, ROWS)]]
    want = [model.attribution(ids, active_experts=sets, chunk_size=3) for ids, sets in jobs]
    logits = model(input_ids).logits
    found, plain, together = {}, [], threading.Barrier(len(jobs) + 1)

    def attribute(number):
        together.wait()
        ids, sets = jobs[number]
        found[number] = [model.attribution(ids, active_experts=sets, chunk_size=3) for _ in range(5)]

    def forward():
        together.wait()
        plain.extend(model(input_ids) for _ in range(10))

    threads = [threading.Thread(target=attribute, args=(number,)) for number in range(len(jobs))]
    threads.append(threading.Thread(target=forward))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for number, one in enumerate(want):
        assert len(found[number]) == 5
        assert all(torch.equal(other.weights, one.weights) for other in found[number])
    assert len(plain) == 10
    assert all(output.router_logits is None for output in plain)
    assert all(torch.allclose(output.logits, logits, atol=1e-6) for output in plain)


def test_a_recording_with_a_layer_missing_is_refused(input_ids, monkeypatch):
    model = named_model()
    model.attribution(input_ids)
    monkeypatch.setattr(output_capturing._active_collector, "compiling", True)

    with pytest.raises(ConfigurationError, match="compiling"):
        model.attribution(input_ids)


def test_training_is_left_as_it_was(input_ids):
    model = named_model(2, attention_dropout=0.5)
    want = model.attribution(input_ids, chunk_size=4)
    model.train()
    model.activation_checkpointing_enable()
    model.mixtures[0].eval()
    modes = [module.training for module in model.modules()]
    found = model.attribution(input_ids, chunk_size=4)

    assert torch.equal(found.weights, want.weights)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()
    assert not found.weights.requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_an_attribution_becomes_json_and_a_short_table_without_the_tokens(input_ids):
    found = named_model(2).attribution(input_ids)
    plain = json.loads(json.dumps(found.to_dict()))

    assert plain == found.to_dict()
    assert set(plain) == {"experts", "tokens", "shares", "shares_per_row", "shares_per_layer"}
    assert torch.equal(torch.tensor(found.to_dict(with_weights=True)["weights"]), found.weights)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines[:4]] == sorted(NAMES, key=lambda name: -found.shares[name])
    assert lines[4] == "33 tokens, 2 layers"
    assert "tensor" not in repr(found)
    assert copy.deepcopy(found).shares == pickle.loads(pickle.dumps(found)).shares == found.shares


@pytest.mark.parametrize(
    ("sets", "error"),
    [(["maht"], UnknownExpertError), ([["public"], ["math"]], ExpertRowsError)],
    ids=["unknown expert", "two sets for three rows"],
)
def test_a_set_that_makes_no_sense_is_refused(input_ids, sets, error):
    with pytest.raises(error):
        named_model().attribution(input_ids, active_experts=sets)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.0, True, None])
def test_a_size_of_pieces_that_makes_no_sense_is_refused(input_ids, chunk_size):
    with pytest.raises(ConfigurationError, match="at least 1"):
        named_model().attribution(input_ids, chunk_size=chunk_size)


@pytest.mark.slow
@pytest.mark.parametrize("per_token", [7, 4], ids=["all of 7", "4 of 7"])
@torch.no_grad()
def test_it_takes_less_than_a_tenth_longer_than_a_forward_pass(per_token):
    settings = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8}
    model = FlexOlmoForCausalLM(
        FlexOlmoConfig(**{**TINY, **settings}, num_experts=7, num_experts_per_tok=per_token)
    ).eval()
    ids = torch.randint(2, TINY["vocab_size"], (1, 128))
    ways = {"plain": lambda: model.model(ids, use_cache=False), "attribution": lambda: model.attribution(ids)}
    turns = []
    for turn in range(17):
        seconds = {}
        # Side by side and in changing order, so that whatever else the machine does falls on both.
        for name in sorted(ways, reverse=turn % 2 == 0):
            start = time.perf_counter()
            ways[name]()
            seconds[name] = time.perf_counter() - start
        turns.append(seconds)
    ratio = statistics.median(seconds["attribution"] / seconds["plain"] for seconds in turns[2:])
    plain = statistics.median(seconds["plain"] for seconds in turns[2:])
    print(f"{per_token} of 7: a forward pass takes {plain * 1e3:.1f} ms, attribution {ratio:.3f} times that")

    assert ratio < 1.1
