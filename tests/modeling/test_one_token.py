"""One token of each row takes a shorter way through a layer than its modules do; whoever watches them is asked."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import AttentionInterface, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling import few_rows, one_token
from flexolmo_hf.modeling import layer as layer_file
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm
from flexolmo_hf.modeling.router import FlexOlmoRouter
from tests.modeling.test_expert_sets import named_model, poison

NEAR = {"atol": 1e-5, "rtol": 1e-5}
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES = pytest.mark.parametrize(
    "changes",
    [{}, GROUPED, {"attention_bias": True}, {"router_bias": True}, {"norm_topk_prob": True}],
    ids=str,
)


@pytest.fixture
def short(monkeypatch):
    """Tell for each layer that was run whether attention took the short way, and whether the mixture did."""
    taken = {"attention": [], "mixture": []}
    attention, mixture = one_token.plain_weights, FlexOlmoMixture.of_one_token

    def spy(*args):
        weights = attention(*args)
        taken["attention"].append(weights is not None)
        return weights

    def spy_on_mixture(*args):
        mixed = mixture(*args)
        taken["mixture"].append(mixed is not None)
        return mixed

    monkeypatch.setattr(layer_file.one_token, "plain_weights", spy)
    monkeypatch.setattr(FlexOlmoMixture, "of_one_token", spy_on_mixture)
    return taken


def decoded(model, ids, cache=None, **arguments):
    """Decode token by token, the first of them from an empty cache."""
    logits = []
    for at in range(ids.shape[1]):
        if "attention_mask" in arguments:
            arguments["attention_mask"] = torch.tensor([[0, 0, *[1] * (at - 1)]])[:, : at + 1]
        output = model(ids[:, at : at + 1], past_key_values=cache, **arguments)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, dim=1)


def by_modules(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(layer_file.one_token, "plain_weights", lambda *_: None)
        return run()


@SHAPES
@pytest.mark.parametrize("per_token", [4, 2, 1])
@pytest.mark.parametrize("sets", [None, ["public", "news"], ["math"], [["code", "math"]]], ids=str)
@torch.no_grad()
def test_the_short_way_gives_what_the_modules_give(monkeypatch, input_ids, short, changes, per_token, sets):
    model, ids = named_model(per_token, **changes), input_ids[:1, :5]
    found = decoded(model, ids, active_experts=sets)
    assert all(short["attention"]) == ("attention_bias" not in changes)
    assert any(short["attention"]) == ("attention_bias" not in changes)
    expected = by_modules(monkeypatch, lambda: decoded(model, ids, active_experts=sets))
    torch.testing.assert_close(found, expected, **NEAR)
    torch.testing.assert_close(model(ids, active_experts=sets).logits, expected, **NEAR)


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=str)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@torch.no_grad()
def test_masks_and_caches_are_heeded(monkeypatch, input_ids, short, changes, static, masked):
    model, ids = named_model(**changes), input_ids[:1, :6]

    def run():
        cache = StaticCache(config=model.config, max_cache_len=9) if static else None
        return decoded(model, ids, cache, **({"attention_mask": None} if masked else {}))

    found = run()
    assert all(short["attention"]) and all(short["mixture"])
    assert len(short["mixture"]) == 6 * model.config.num_hidden_layers
    # What is hidden from all tokens has no values that mean anything.
    torch.testing.assert_close(found[:, 2:], by_modules(monkeypatch, run)[:, 2:], **NEAR)
    if masked:
        assert not torch.allclose(found[:, 2:], decoded(model, ids)[:, 2:])


@pytest.mark.parametrize("changes", [{}, GROUPED], ids=str)
@pytest.mark.parametrize("per_token", [4, 2])
@pytest.mark.parametrize("rows", [2, 5, 12])
@pytest.mark.parametrize("sets", [None, ["public", "news"], "each"], ids=str)
@torch.no_grad()
def test_several_rows_go_the_short_way_together(monkeypatch, short, changes, per_token, rows, sets):
    monkeypatch.setattr(few_rows, "_SMALL", 0)
    model, ids = named_model(per_token, **changes), torch.randint(3, 90, (rows, 6))
    each = [["public"], ["math", "code"], None, ["news", "public", "code"]]
    sets = [each[row % 4] for row in range(rows)] if sets == "each" else sets
    mask = torch.ones_like(ids)
    mask[1, :2] = 0

    def run():
        cache, logits = model(ids[:, :3], attention_mask=mask[:, :3], active_experts=sets).past_key_values, []
        for at in range(3, 6):
            now = {"attention_mask": mask[:, : at + 1], "past_key_values": cache, "active_experts": sets}
            logits.append(model(ids[:, at : at + 1], **now).logits)
        return torch.cat(logits, dim=1)

    found = run()
    assert short["attention"] == [False] * 2 + [True] * 6
    torch.testing.assert_close(found, by_modules(monkeypatch, run), **NEAR)
    alone = model(ids[:1], active_experts=[sets[0]] if sets and isinstance(sets[0], list) else sets).logits
    torch.testing.assert_close(found[0], alone[0, 3:], **NEAR)


@pytest.mark.parametrize("per_token", [4, 2])
@torch.no_grad()
def test_what_a_row_may_not_use_leaves_no_trace_in_it(input_ids, per_token):
    model, ids = named_model(per_token), torch.randint(3, 90, (3, 4))
    rows = [["public"], ["public", "math"], ["code", "news"]]

    def run():
        cache = model(ids[:, :2], active_experts=rows).past_key_values
        return model(ids[:, 2:3], past_key_values=cache, active_experts=rows).logits

    before = run()
    poison(model, ["code", "news"])
    after = run()
    assert torch.equal(after[:2], before[:2])
    assert after[2].isnan().all()


@pytest.mark.parametrize("per_token", [4, 2])
@torch.no_grad()
def test_what_is_off_leaves_no_trace(input_ids, short, per_token):
    model, ids = named_model(per_token), input_ids[:1, :4]
    model.set_active_experts(["public", "code"])
    before = decoded(model, ids)
    poison(model, ["math", "news"])
    assert torch.equal(decoded(model, ids), before)
    assert all(short["mixture"])


@torch.no_grad()
def test_more_than_a_token_and_other_numbers_go_through_the_modules(input_ids, short):
    model = named_model()
    model(input_ids[:1, :2])
    model(input_ids[:1, :1].repeat(33, 1))
    copy.deepcopy(model).to(torch.bfloat16)(input_ids[:1, :1])
    copy.deepcopy(model).double()(input_ids[:1, :1])
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    eager(input_ids[:1, :1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids[:1, :1])
    with torch.enable_grad():
        model(input_ids[:1, :1])
    assert not any(short["attention"])
    with torch.inference_mode():
        model(input_ids[:1, :1])
    assert all(short["attention"][-2:]) and all(short["mixture"][-2:])


def parts(model):
    first = model.model.layers[0]
    attention = first.self_attn
    return {
        "attention": attention,
        **{name: getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")},
        "after attention": first.post_attention_layernorm,
        "after the mixture": first.post_feedforward_layernorm,
        "mixture": first.mlp,
        "router": first.mlp.gate,
        "expert": first.mlp.experts["1"],
    }


@pytest.mark.parametrize("name", parts(named_model()))
@torch.no_grad()
def test_a_module_that_somebody_watches_is_called(input_ids, short, name):
    model, called, ids = named_model(), [], input_ids[:1, :1]
    expected = model(ids).logits
    watched = parts(model)[name]
    way = "mixture" if name in ("mixture", "router", "expert") else "attention"
    for register in (watched.register_forward_hook, watched.register_forward_pre_hook):
        handle = register(lambda *_: called.append(1))
        torch.testing.assert_close(model(ids).logits, expected, **NEAR)
        assert short[way][-2:] == [False, True]
        handle.remove()
    watched.forward = lambda *args, real=watched.forward, **kwargs: called.append(2) or real(*args, **kwargs)
    torch.testing.assert_close(model(ids).logits, expected, **NEAR)
    assert called == [1, 1, 2]
    del watched.forward
    assert torch.equal(model(ids).logits, expected)
    everywhere = register_module_forward_hook(lambda *_: called.append(3))
    model(ids)
    everywhere.remove()
    assert called.count(3) > 20


@pytest.mark.parametrize(
    "name", ["attention", "q_proj", "o_proj", "k_norm", "after attention", "mixture", "router", "expert"]
)
@torch.no_grad()
def test_a_module_of_another_kind_is_called(input_ids, name):
    model, ids = named_model(), input_ids[:1, :3]
    expected = decoded(model, ids)
    old = parts(model)[name]

    class Another(type(old)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            if name == "attention":
                return output[0].roll(1, -1), output[1]
            return (output[0], output[1].roll(1, -1)) if isinstance(output, tuple) else output.roll(1, -1)

    old.__class__ = Another
    assert not torch.allclose(decoded(model, ids), expected, **NEAR)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (upstream.FlexOlmoAttention, "forward"),
        (layer_file.FlexOlmoAttention, "forward"),
        (upstream, "apply_rotary_pos_emb"),
        (FlexOlmoRMSNorm, "forward"),
        (FewRowsLinear, "forward"),
        (FlexOlmoRouter, "forward"),
        (FlexOlmoMixture, "forward"),
    ],
)
@torch.no_grad()
def test_what_a_library_replaces_for_a_whole_class_is_called(monkeypatch, input_ids, owner, name):
    model = named_model()
    monkeypatch.setattr(owner, name, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids[:1, :1])


@torch.no_grad()
def test_outputs_that_are_asked_for_are_the_modules(monkeypatch, input_ids):
    model, ids = named_model(2), input_ids[:1, :1]
    asked = {"output_hidden_states": True, "output_router_logits": True}
    found = copy.deepcopy(model)(ids, **asked)
    expected = by_modules(monkeypatch, lambda: model(ids, **asked))
    assert len(found.router_logits) == len(found.hidden_states) - 1 == model.config.num_hidden_layers
    for mine, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(mine, theirs, **NEAR)
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, theirs, **NEAR)


@torch.no_grad()
def test_hooks_that_recorded_once_are_nobody_who_watches_later(input_ids, short):
    model, ids = named_model(2), input_ids[:1, :1]
    expected = model(ids).logits
    model(ids, output_router_logits=True, output_hidden_states=True)
    model.attribution(input_ids)
    assert short["attention"] == [True, True, False, False, False, False]
    assert torch.equal(model(ids).logits, expected)
    assert short["attention"][-2:] == short["mixture"][-2:] == [True, True]
    called = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda *_: called.append(1))
    model(ids)
    assert called == [1]


@torch.no_grad()
def test_dropout_in_training_mode_is_not_left_out(input_ids, short):
    model = named_model(attention_dropout=0.5).train()
    model(input_ids[:1, :1])
    assert not any(short["attention"])
    model.eval()(input_ids[:1, :1])
    assert all(short["attention"][-2:])


@torch.no_grad()
def test_memory_that_stays_holds_nothing_that_is_read_or_handed_out(input_ids):
    models, ids = [named_model(), named_model(**GROUPED)], input_ids[:1, :4]
    expected = [decoded(model, ids) for model in models]
    kept = [logits.clone() for logits in expected]
    for _ in range(2):
        for model, logits in zip(models, kept, strict=True):
            one_token._MEMORY.heads.fill_(float("nan"))
            assert torch.equal(decoded(model, ids), logits)
    with torch.inference_mode():
        assert torch.equal(decoded(models[0], ids), kept[0])
    assert torch.equal(decoded(models[0], ids), kept[0])
    assert all(torch.equal(logits, first) for logits, first in zip(expected, kept, strict=True))


def test_a_row_of_zeros_has_no_scale():
    assert one_token._scale(torch.zeros(1, 3), 0.0) == float("inf")
    assert one_token._scale(torch.full((1, 4), 2.0), 12.0) == 0.25
    assert torch.tensor(one_token._scale(torch.tensor([[float("nan")]]), 1e-6)).isnan()


@torch.no_grad()
def test_a_norm_of_other_numbers_is_called(input_ids, short):
    model = named_model()
    expected = model(input_ids[:1, :1]).logits
    norm = model.model.layers[0].self_attn.q_norm
    norm.weight = nn.Parameter(norm.weight.double())
    torch.testing.assert_close(model(input_ids[:1, :1]).logits, expected, atol=1e-5, rtol=1e-5)
    assert short["attention"] == [True, True, False, True]


@torch.no_grad()
def test_a_weight_of_another_kind_is_left_to_its_module(input_ids, short):
    class Sharded(nn.Parameter):
        pass

    model = named_model()
    linear = model.model.layers[1].self_attn.o_proj
    linear.weight = Sharded(linear.weight.data)
    model(input_ids[:1, :1])
    assert short["attention"] == [True, False]


@torch.no_grad()
def test_attention_that_somebody_registered_is_called(input_ids, short):
    called = []

    def mine(*args, **kwargs):
        called.append(1)
        return sdpa_attention_forward(*args, **kwargs)

    AttentionInterface.register("mine", mine)
    model = named_model()
    model.set_attn_implementation("mine")
    model(input_ids[:1, :1])
    assert called == [1, 1]
    assert not any(short["attention"])


@torch.no_grad()
def test_attention_that_is_told_more_is_called():
    first, hidden = named_model().model.layers[0], torch.zeros(1, 1, 64)
    known = {"attention_mask": None, "use_cache": True}
    assert one_token.plain_weights(first, hidden, known) is not None
    assert one_token.plain_weights(first, hidden, {**known, "position_bias": torch.zeros(1)}) is None


@pytest.mark.parametrize("way", ["dense", "grouped_mm", "eager"])
@torch.no_grad()
def test_a_way_to_run_the_experts_that_was_asked_for_is_taken(input_ids, short, way):
    model = named_model(2)
    model.set_experts_implementation(way)
    model(input_ids[:1, :1])
    assert short == {"attention": [True, True], "mixture": [way == "eager"] * 2}


@torch.no_grad()
def test_the_mixture_never_takes_the_sets_of_several_rows_for_one():
    model = named_model()
    rows = model.select_experts([["public"], ["math", "code"]], 2)
    assert model.mixtures[0].of_one_token(torch.zeros(64), rows) is None


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("name", ["self_attn", "gate", "o_proj", "q_norm"])
@torch.no_grad()
def test_a_module_in_a_wrapper_is_called(input_ids, name):
    model = named_model()
    first = model.model.layers[0]
    owner = {"self_attn": first, "gate": first.mlp}.get(name, first.self_attn)
    expected = decoded(model, input_ids[:1, :3])
    setattr(owner, name, Wrapped(getattr(owner, name)))
    torch.testing.assert_close(decoded(model, input_ids[:1, :3]), expected, **NEAR)


@pytest.mark.parametrize("name", ["q_proj", "k_norm"])
@torch.no_grad()
def test_a_weight_that_is_no_parameter_is_left_to_its_module(input_ids, short, name):
    model = named_model()
    expected = model(input_ids[:1, :1]).logits
    module = getattr(model.model.layers[0].self_attn, name)
    values = module.weight.data.clone()
    del module.weight
    module.weight = values
    torch.testing.assert_close(model(input_ids[:1, :1]).logits, expected, **NEAR)
    assert short["attention"] == [True, True, False, True]


@torch.no_grad()
def test_a_bias_that_somebody_added_counts(monkeypatch, input_ids):
    model, ids = named_model(), input_ids[:1, :1]
    attention, expert = model.model.layers[0].self_attn, model.expert_modules("math")[1]
    for add in (
        lambda: attention.o_proj.register_parameter("bias", nn.Parameter(torch.ones(64))),
        lambda: (delattr(attention.v_proj, "bias"), attention.v_proj.register_buffer("bias", torch.ones(64))),
        lambda: expert.down_proj.register_parameter("bias", nn.Parameter(torch.ones(64))),
    ):
        before = model(ids).logits
        add()
        with torch.enable_grad():
            expected = model(ids).logits
        assert not torch.allclose(before, expected, **NEAR)
        torch.testing.assert_close(model(ids).logits, expected, **NEAR)


@torch.no_grad()
def test_a_mode_and_a_trace_see_the_modules(input_ids, short):
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function(*args, **(kwargs or {}))

    model, ids = named_model().requires_grad_(False), input_ids[:1, :1]
    with Mode():
        model(ids)
    assert not any(short["attention"])

    class Traced(nn.Module):
        def forward(self, embeddings):
            return model(inputs_embeds=embeddings, use_cache=False).logits

    first, second = torch.randn(2, 1, 1, 64)
    traced = torch.jit.trace(Traced(), (first,), check_trace=False)
    torch.testing.assert_close(traced(second), Traced()(second), **NEAR)


@torch.no_grad()
def test_positions_that_are_written_in_place_are_read_anew(monkeypatch, input_ids):
    model, ids = named_model(), input_ids[:1, :4]
    rotary, kept = model.model.rotary_emb, []

    def in_place(*args, real=rotary.forward, **kwargs):
        found = real(*args, **kwargs)
        if not kept or kept[0].shape != found[0].shape:
            kept[:] = [part.clone() for part in found]
        for part, new in zip(kept, found, strict=True):
            part.copy_(new)
        return tuple(kept)

    rotary.forward = in_place
    found = decoded(model, ids)
    torch.testing.assert_close(found, by_modules(monkeypatch, lambda: decoded(model, ids)), **NEAR)


@torch.no_grad()
def test_a_compiled_module_is_called(input_ids, short):
    model = named_model()
    model.model.layers[0].self_attn.compile(backend="eager")
    model(input_ids[:1, :1])
    assert short["attention"] == [False, True]
