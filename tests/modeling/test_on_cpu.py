"""Running plain experts without calling them changes no result, and whoever put a hook on an expert is still called."""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook

from flexolmo_hf.modeling import mixture as mixture_file
from flexolmo_hf.modeling import on_cpu
from flexolmo_hf.modeling.adjacent import join_adjacent
from flexolmo_hf.modeling.expert import FlexOlmoExpert
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from tests.modeling.test_expert_sets import named_model

CPU = torch.device("cpu")


def layer(model):
    return list(model.mixtures[0].experts.values())


def plain(experts, device=CPU):
    return on_cpu.plain_weights(experts, torch.empty(1, device=device))


def expected(experts, tokens, positions, shares):
    result = torch.zeros_like(tokens)
    for expert, where, share in zip(experts, positions, shares, strict=True):
        result.index_add_(0, where, expert(tokens[where]) * share)
    return result


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 1, 5, 7), (0, 8, 2, 16), (70, 40, 30, 100), (0, 0, 0, 0)])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("width", [172, 192])
@torch.no_grad()
def test_a_mix_is_the_weighted_sum_of_what_each_expert_gives(counts, activation, width):
    model = named_model(hidden_act=activation, intermediate_size=width)
    experts, tokens = layer(model), torch.randn(100, 64)
    positions = [torch.randperm(100)[:count] for count in counts]
    shares = [torch.rand(count, 1) for count in counts]

    mixed = on_cpu.mix(tokens, plain(experts), experts[0].act_fn, counts, torch.cat(positions), torch.cat(shares))

    torch.testing.assert_close(mixed, expected(experts, tokens, positions, shares), atol=1e-6, rtol=1e-5)
    untouched = torch.ones(100, dtype=torch.bool).index_fill(0, torch.cat(positions), False)
    assert mixed[untouched].eq(0).all()


@pytest.mark.parametrize("tokens", [1, 5, 17, 90])
@torch.no_grad()
def test_without_positions_every_expert_works_on_all_tokens(tokens):
    experts, tokens_NH = layer(named_model()), torch.randn(tokens, 64)
    shares = torch.rand(4, tokens, 1)

    mixed = on_cpu.mix(tokens_NH, plain(experts), experts[0].act_fn, [tokens] * 4, None, shares.flatten(0, 1))

    everywhere = [torch.arange(tokens)] * 4
    torch.testing.assert_close(mixed, expected(experts, tokens_NH, everywhere, shares), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("per_token", [4, 2, 1])
@pytest.mark.parametrize("sets", [None, ["public", "news"], [["public"], ["math", "code", "news"], ["math"]]])
@pytest.mark.parametrize("tokens", [1, 3, 11])
@torch.no_grad()
def test_the_mixture_gives_what_it_gives_one_by_one(monkeypatch, input_ids, per_token, sets, tokens):
    model = named_model(per_token)
    together = model(input_ids[:, :tokens], active_experts=sets).logits
    used = []
    monkeypatch.setattr(
        mixture_file.on_cpu, "plain_weights", lambda *a, real=on_cpu.plain_weights: used.append(real(*a))
    )
    apart = model(input_ids[:, :tokens], active_experts=sets).logits

    assert any(used)
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_an_expert_that_is_not_plain_is_called_itself(input_ids):
    model, called = named_model(), []
    assert plain(layer(model))
    expert = model.expert_modules("math")[0]
    for module in (expert, expert.up_proj):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            handle = register(lambda *_: called.append(1))
            assert plain(layer(model)) is None
            model(input_ids[:1, :1])
            handle.remove()
    assert called == [1] * 4
    expert.forward = expert.forward
    assert plain(layer(model)) is None
    del expert.forward
    assert plain(layer(model))
    expert.up_proj = nn.Sequential(expert.up_proj)
    assert plain(layer(model)) is None


@torch.no_grad()
def test_an_activation_of_its_own_is_called(input_ids):
    model, called = named_model(), []
    second = layer(model)[1]
    handle = second.act_fn.register_forward_hook(lambda *_: called.append(1))
    assert plain(layer(model)) is None
    model(input_ids[:1, :1])
    assert called == [1]
    handle.remove()
    for other in (nn.GELU(), nn.PReLU()):
        second.act_fn = other
        assert plain(layer(model)) is None
    everywhere = register_module_forward_hook(lambda *_: called.append(2))
    second.act_fn = layer(model)[0].act_fn
    assert plain(layer(model)) is None
    everywhere.remove()
    assert plain(layer(model))


@torch.no_grad()
def test_a_class_whose_forward_was_replaced_is_called(monkeypatch, input_ids):
    model = named_model()
    monkeypatch.setattr(FlexOlmoExpert, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(input_ids[:1, :1])


def test_experts_are_run_so_only_on_a_cpu_without_gradient():
    experts = layer(named_model())
    assert plain(experts) is None
    with torch.no_grad():
        assert plain(experts)
        assert plain(experts, torch.device("meta")) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert plain(experts) is None
    with torch.inference_mode():
        assert plain(experts)


@pytest.fixture
def loaded(tmp_path):
    named_model(intermediate_size=192).save_pretrained(tmp_path)
    return FlexOlmoForCausalLM.from_pretrained(tmp_path).eval()


@torch.no_grad()
def test_gate_and_up_of_a_file_are_one_matrix_without_a_copy(loaded, input_ids):
    for experts in (mixture.experts.values() for mixture in loaded.mixtures):
        for expert, weights in zip(experts, plain(list(experts)), strict=True):
            both = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            assert torch.equal(weights.gate_up, both)
            assert weights.gate_up.data_ptr() == expert.gate_proj.weight.data_ptr()
    apart = copy.deepcopy(loaded)
    for parameter in apart.parameters():
        parameter.data = parameter.data.clone()
    assert all(weights.gate_up is None for weights in plain(layer(apart)))
    for ids in (input_ids, input_ids[:1, :1], input_ids[:2, :3]):
        assert torch.equal(loaded(ids).logits, apart(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gate_proj", "up_proj"])
def test_a_weight_that_moves_or_changes_is_followed(loaded, input_ids, name):
    loaded(input_ids)
    linear = getattr(layer(loaded)[1], name)
    linear.weight.mul_(2)
    reference = copy.deepcopy(loaded)
    assert torch.equal(loaded(input_ids).logits, reference(input_ids).logits)
    linear.weight.data = linear.weight.data * 2
    getattr(layer(reference)[1], name).weight.mul_(2)
    assert torch.equal(loaded(input_ids).logits, reference(input_ids).logits)


@torch.no_grad()
def test_copies_and_pickles_do_not_hold_the_former_memory(loaded, input_ids):
    loaded(input_ids)
    assert layer(loaded)[0].joined is not None
    file = io.BytesIO()
    torch.save(loaded, file)
    file.seek(0)
    for other in (
        copy.deepcopy(loaded),
        pickle.loads(pickle.dumps(layer(loaded)[0])),
        torch.load(file, weights_only=False),
    ):
        assert (other if isinstance(other, FlexOlmoExpert) else layer(other)[0]).joined is None


def test_only_matrices_that_lie_side_by_side_are_joined():
    both = torch.arange(24.0).view(6, 4)
    joined = join_adjacent(both[:2], both[2:])
    assert torch.equal(joined.both, both)
    assert joined.both.data_ptr() == both.data_ptr()
    assert joined.holds(both[:2], both[2:])
    assert not joined.holds(both[:2].clone(), both[2:])
    assert join_adjacent(both[2:], both[:2]) is None
    assert join_adjacent(both[:2], both[3:]) is None
    assert join_adjacent(both[:2, :2], both[2:, :2]) is None
    assert join_adjacent(both[:2].view(4, 2), both[2:]) is None
    assert join_adjacent(both[:2], both[2:].view(torch.int32)) is None
    assert join_adjacent(both[:0], both[:2]) is None


def test_what_is_joined_keeps_its_memory():
    both = torch.arange(4e6).view(1000, 4000)
    joined, expected_values = join_adjacent(both[:400], both[400:]), both.clone()
    del both
    others = [torch.full((1000, 4000), -1.0) for _ in range(4)]
    assert torch.equal(joined.both, expected_values)
    assert len(others) == 4


def without_values(model, ids):
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        return model(fake.from_tensor(ids)).logits


def functional(model, ids):
    return torch.func.functionalize(lambda ids: model(ids).logits)(ids)


def mapped(model, ids):
    return torch.func.vmap(lambda ids: model(ids).logits)(ids.unsqueeze(0))[0]


@pytest.mark.parametrize("run", [without_values, functional, mapped])
@torch.no_grad()
def test_what_stands_for_a_token_leaves_nothing_behind(run):
    model, ids = named_model(), torch.tensor([[5]])
    expected = model(ids).logits
    assert run(model, ids).shape == expected.shape
    found = model(ids).logits
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)


@torch.no_grad()
def test_one_token_is_decoded_anew_each_time_whatever_was_left_in_memory():
    models = [named_model(), named_model(per_token=2), named_model(intermediate_size=172)]
    models += [named_model().to(torch.bfloat16), named_model().double()]
    ids = torch.tensor([[5]])
    expected = [model(ids).logits for model in models]
    for _ in range(2):
        for model, first in zip(models, expected, strict=True):
            kept = first.clone()
            left = on_cpu._ONE_TOKEN
            for buffer in (left.all_gates, left.all_ups, left.all_outputs):
                buffer.fill_(float("nan"))
            assert torch.equal(model(ids).logits, kept)
            assert torch.equal(first, kept)
    with torch.inference_mode():
        assert torch.equal(models[0](ids).logits, expected[0])
    assert torch.equal(models[0](ids).logits, expected[0])


@torch.no_grad()
def test_threads_do_not_write_into_each_others_memory():
    models = [named_model() for _ in range(4)]
    ids = torch.tensor([[5]])
    expected = [model(ids).logits for model in models]
    with ThreadPoolExecutor(4) as pool:
        same = pool.map(
            lambda at: [torch.equal(_without_gradient(models[at], ids), expected[at]) for _ in range(50)], range(4)
        )
        assert all(all(of_thread) for of_thread in same)


@torch.no_grad()
def _without_gradient(model, ids):
    # Whether gradient is wanted is said in each thread.
    return model(ids).logits


@pytest.mark.parametrize("tokens", [1, 40, 200])
@torch.no_grad()
def test_an_activation_may_look_at_all_neurons_of_a_token(tokens):
    model = named_model(1)
    model.set_active_experts(["public"])
    for mixture in model.mixtures:
        for expert in mixture.experts.values():
            expert.act_fn = nn.Softmax(-1)
    ids = torch.randint(3, 90, (1, tokens))
    found = model(ids).logits
    with torch.enable_grad():
        torch.testing.assert_close(found, model(ids).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_activations_of_one_kind_with_other_settings_are_called_themselves(input_ids):
    model = named_model()
    for slope, expert in zip((0.1, 0.1, 0.1, 0.2), layer(model), strict=True):
        expert.act_fn = nn.LeakyReLU(slope)
    assert plain(layer(model)) is None
    layer(model)[3].act_fn.negative_slope = 0.1
    assert plain(layer(model))
