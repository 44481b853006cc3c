"""The last layer's mixture runs for the tokens whose logits are asked for; whoever would miss the others gets them."""

import copy
from contextlib import contextmanager

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import StaticCache
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.errors import ConfigurationError, UnknownArgumentError
from flexolmo_hf.modeling.expert import FlexOlmoExpert
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.layer import FlexOlmoDecoderLayer
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.model import FlexOlmoMixtureModel
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm
from flexolmo_hf.modeling.router import FlexOlmoRouter
from tests.modeling.test_expert_sets import named_model, poison

NEAR = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def ids():
    return torch.randint(3, 90, (2, 12))


class RoutedTokens(TorchDispatchMode):
    """For how many tokens each router made probabilities, call by call."""

    def __init__(self):
        super().__init__()
        self.counts = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._softmax.default:
            self.counts.append(output.shape[:-1].numel())
        return output


@contextmanager
def all_tokens(model):
    """Have someone watch, so that nothing is left out."""
    handle = model.model.norm.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


def routed(model, *args, **kwargs):
    with RoutedTokens() as tokens:
        output = model(*args, **kwargs)
    return tokens.counts, output


@pytest.mark.parametrize("per_token", [4, 2, 1])
@pytest.mark.parametrize("sets", [None, ["public", "news"], [["public"], None], [["math"], ["math", "code"]]], ids=str)
@pytest.mark.parametrize("kept", [1, 5, torch.tensor([0, 7, -1])], ids=["last", "five", "positions"])
@torch.no_grad()
def test_the_logits_are_those_of_a_forward_over_all_tokens(ids, per_token, sets, kept):
    model = named_model(per_token)
    tokens = ids.numel()
    asked = {"active_experts": sets, "logits_to_keep": kept}
    with all_tokens(model):
        counts, expected = routed(model, ids, **asked)
    assert sum(counts) == 2 * tokens
    counts, found = routed(model, ids, **asked)
    assert sum(counts) == tokens + len(ids) * (kept if isinstance(kept, int) else len(kept))
    torch.testing.assert_close(found.logits, expected.logits, **NEAR)
    for mine, theirs in zip(found.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


@pytest.mark.parametrize("static", [False, True])
@torch.no_grad()
def test_prompts_in_pieces_and_padding_change_nothing(ids, static):
    model = named_model(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0

    def run():
        cache = StaticCache(config=model.config, max_cache_len=20) if static else None
        for start, end in ((0, 5), (5, ids.shape[1])):
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, logits_to_keep=1)
            cache = output.past_key_values
        return output.logits

    with all_tokens(model):
        expected = run()
    torch.testing.assert_close(run(), expected, **NEAR)
    full = model(ids, attention_mask=mask).logits[:, -1:]
    torch.testing.assert_close(run(), full, **NEAR)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=str)
@torch.no_grad()
def test_generation_gives_the_same_tokens(ids, how):
    model, ids = named_model(2), ids[:1].repeat(1, 2)
    with RoutedTokens() as tokens:
        found = model.generate(ids, max_new_tokens=8, do_sample=False, **how)
    rows, drafted = how.get("num_beams", 1), how.get("prompt_lookup_num_tokens", 0)
    assert tokens.counts[:2] == [rows * (ids.shape[1] + drafted), rows * (1 + drafted)]
    with all_tokens(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **how), found)


@torch.no_grad()
def test_what_is_off_leaves_no_trace(ids):
    model = named_model(2)
    rows = [["public", "math"], ["news", "code"]]
    before = model(ids, active_experts=rows, logits_to_keep=1).logits
    poison(model, ["code"])
    after = model(ids, active_experts=rows, logits_to_keep=1).logits
    assert torch.equal(after[0], before[0])
    assert after[1].isnan().all()


@pytest.mark.parametrize(
    "kept",
    [0, 12, 99, torch.arange(12), torch.tensor([[0, 3], [5, 1]]), torch.eye(12)[:2] > 0, torch.arange(12) > 8]
    + [torch.arange(0)],
    ids=["all", "as many", "more", "positions", "of each row", "mask of each row", "mask", "none"],
)
@torch.no_grad()
def test_all_tokens_run_where_none_can_be_left_out(ids, kept):
    model = named_model()
    counts, found = routed(model, ids, logits_to_keep=kept)
    assert counts == [ids.numel()] * 2
    expected = upstream.slice_logits_to_keep(model.model(ids).last_hidden_state, kept)
    torch.testing.assert_close(found.logits, model.lm_head(expected), **NEAR)


def those_that_follow(model):
    backbone = model.model
    last = backbone.layers[-1]
    return {
        "backbone": backbone,
        "norm": backbone.norm,
        "layer": last,
        "after attention": last.post_attention_layernorm,
        "after the mixture": last.post_feedforward_layernorm,
        "mixture": last.mlp,
        "router": last.mlp.gate,
        "expert": last.mlp.experts["1"],
        "down": last.mlp.experts["2"].down_proj,
    }


@pytest.mark.parametrize("name", those_that_follow(named_model()))
@torch.no_grad()
def test_whoever_watches_sees_all_tokens(ids, name):
    model = named_model()
    expected = model(ids).logits[:, -1:]
    watched, seen = those_that_follow(model)[name], []

    def see(module, args, kwargs, output=None):
        tensors = [value for value in (*args, *kwargs.values(), output) if isinstance(value, torch.Tensor)]
        seen.append(max(tensor.shape[1] for tensor in tensors if tensor.ndim > 1))

    for register in (watched.register_forward_hook, watched.register_forward_pre_hook):
        handle = register(see, with_kwargs=True)
        counts, found = routed(model, ids, logits_to_keep=1)
        handle.remove()
        assert counts == [ids.numel()] * 2
        torch.testing.assert_close(found.logits, expected, **NEAR)
    assert len(seen) == 2
    assert min(seen) >= ids.shape[1]
    watched.forward = lambda *args, real=watched.forward, **kwargs: real(*args, **kwargs)
    assert routed(model, ids, logits_to_keep=1)[0] == [ids.numel()] * 2
    del watched.forward
    assert sum(routed(model, ids, logits_to_keep=1)[0]) == ids.numel() + len(ids)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
@torch.no_grad()
def test_whoever_watches_all_modules_sees_all_tokens(ids, register):
    model = named_model()
    handle = register(lambda *_: None)
    counts, _ = routed(model, ids, logits_to_keep=1)
    handle.remove()
    assert counts == [ids.numel()] * 2


@pytest.mark.parametrize(
    "owner",
    [
        upstream.FlexOlmoModel,
        FlexOlmoMixtureModel,
        FlexOlmoDecoderLayer,
        FlexOlmoMixture,
        FlexOlmoRouter,
        FlexOlmoExpert,
        FewRowsLinear,
        FlexOlmoRMSNorm,
    ],
    ids=lambda owner: owner.__name__,
)
@torch.no_grad()
def test_what_a_library_replaces_for_a_whole_class_sees_all_tokens(monkeypatch, ids, owner):
    model, real = named_model(), owner.forward
    monkeypatch.setattr(owner, "forward", lambda *args, **kwargs: real(*args, **kwargs))
    assert routed(model, ids, logits_to_keep=1)[0] == [ids.numel()] * 2


@pytest.mark.parametrize("name", [name for name in those_that_follow(named_model()) if name != "backbone"])
@torch.no_grad()
def test_a_module_of_another_class_sees_all_tokens(ids, name):
    model = named_model()
    module = those_that_follow(model)[name]

    class Another(type(module)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            return output.cumsum(1) if isinstance(output, torch.Tensor) and output.ndim == 3 else output

    module.__class__ = Another
    counts, found = routed(model, ids, logits_to_keep=1)
    assert counts == [ids.numel()] * 2
    torch.testing.assert_close(found.logits, model(ids).logits[:, -1:], **NEAR)


@torch.no_grad()
def test_low_rank_and_narrow_experts_and_other_activations_are_known(ids):
    forms = {"math": {"rank": 4}, "news": {"width": 20}}
    for changes in ({"expert_forms": forms}, {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}):
        model = named_model(2, **changes)
        counts, found = routed(model, ids, logits_to_keep=1)
        assert sum(counts) == ids.numel() + len(ids)
        torch.testing.assert_close(found.logits, model(ids).logits[:, -1:], **NEAR)


@pytest.mark.parametrize("where", ["call", "configuration"])
@pytest.mark.parametrize("name", ["output_hidden_states", "output_router_logits"])
@torch.no_grad()
def test_outputs_that_are_asked_for_are_of_all_tokens(ids, name, where):
    model = named_model()
    plain = model(ids).logits[:, -1:]
    asked = {name: True} if where == "call" else {}
    if where == "configuration":
        setattr(model.config, name, True)
    for _ in range(2):
        counts, found = routed(model, ids, logits_to_keep=1, **asked)
        assert counts[:2] == [ids.numel()] * 2
        torch.testing.assert_close(found.logits, plain, **NEAR)
        recorded = found.hidden_states or found.router_logits
        assert {record.shape[:-1].numel() for record in recorded} == {ids.numel()}
    # The hooks that recorded stay, and record nothing in a call that asks for nothing.
    setattr(model.config, name, False)
    counts, found = routed(model, ids, logits_to_keep=1)
    assert sum(counts) == ids.numel() + len(ids)
    torch.testing.assert_close(found.logits, plain, **NEAR)


def test_gradients_are_of_all_tokens(ids):
    model = named_model()
    counts, found = routed(model, ids, logits_to_keep=2)
    assert counts == [ids.numel()] * 2
    assert found.logits.requires_grad


@torch.no_grad()
def test_layers_that_are_left_out_have_no_say_in_which_is_last(ids):
    model = named_model(num_hidden_layers=3)
    model.config.num_hidden_layers = 2
    counts, found = routed(model, ids, logits_to_keep=1)
    assert counts == [ids.numel(), len(ids)]
    torch.testing.assert_close(found.logits, model(ids).logits[:, -1:], **NEAR)


@pytest.mark.parametrize("places", [[0, 1], [0, 2, 2], [2, 0, 2]], ids=str)
@torch.no_grad()
def test_layers_that_somebody_has_moved_run_as_they_stand(ids, places):
    model = named_model(num_hidden_layers=3)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[place] for place in places])
    expected = model(ids, use_cache=False).logits[:, -1:]
    counts, found = routed(model, ids, logits_to_keep=1, use_cache=False)
    torch.testing.assert_close(found.logits, expected, **NEAR)
    assert (counts[-1] == len(ids)) == (places.count(places[-1]) == 1)


@torch.no_grad()
def test_a_backbone_of_another_class_sees_all_tokens(ids):
    model = named_model()

    class Probed(type(model.model)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            assert output.last_hidden_state.shape[:2] == ids.shape
            return output

    expected = model(ids).logits[:, -1:]
    model.model.__class__ = Probed
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected, **NEAR)


@torch.no_grad()
def test_a_backbone_in_a_wrapper_and_one_that_is_compiled_see_all_tokens(ids):
    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids=None, output_router_logits=None, active_experts=None, **kwargs):
            return self.inner(input_ids, active_experts=active_experts, **kwargs)

    model, other = named_model(), named_model()
    expected, of_other = (one(ids).logits[:, -1:] for one in (model, other))
    model.model = Wrapped(model.model)
    torch.testing.assert_close(model(ids, logits_to_keep=1).logits, expected, **NEAR)
    model.config.active_experts = ["public"]
    with pytest.raises(ConfigurationError, match="by hand"):
        model(ids)
    counter = CompileCounter()
    other.model.forward = torch.compile(other.model.forward, backend=counter)
    for kept in (1, 2, 3):
        torch.testing.assert_close(other(ids, logits_to_keep=kept).logits[:, -1:], of_other, **NEAR)
    assert counter.frame_count == 1


@torch.no_grad()
def test_hidden_states_are_whole_where_a_layer_has_come_without_the_hook_that_records_it(ids):
    model = named_model()
    fresh = copy.deepcopy(model.model.layers[-1])
    model(ids, output_hidden_states=True)
    model.model.layers[-1] = fresh
    found = model(ids, output_hidden_states=True, logits_to_keep=1)
    assert found.hidden_states[-1].shape[:2] == ids.shape
    assert found.logits.shape[1] == 1


@torch.no_grad()
def test_a_loss_is_told_nothing_new(ids):
    model, told = named_model(), {}
    model.loss_function = lambda *args, **kwargs: told.update(kwargs) or torch.zeros(())
    model(ids, labels=ids, logits_to_keep=1, num_items_in_batch=3)
    assert told == {"num_items_in_batch": 3}


@torch.no_grad()
def test_a_tuple_is_returned_where_one_is_asked_for(ids):
    model = named_model()
    logits, _ = model(ids, logits_to_keep=1, return_dict=False)
    torch.testing.assert_close(logits, model(ids).logits[:, -1:], **NEAR)


@torch.no_grad()
def test_copies_leave_out_in_layers_of_their_own(ids):
    model = named_model()
    other = copy.deepcopy(model)
    with all_tokens(model):
        counts, _ = routed(other, ids, logits_to_keep=1)
    assert sum(counts) == ids.numel() + len(ids)


@pytest.mark.parametrize("learning", [False, True])
def test_a_caller_who_gives_them_is_told_that_nothing_reads_them(ids, learning):
    model = named_model()
    for call in (model, model.model):
        with torch.set_grad_enabled(learning), pytest.raises(UnknownArgumentError, match="kept_tokens"):
            call(ids, kept_tokens=3)
