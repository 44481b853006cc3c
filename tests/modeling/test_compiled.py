"""Compiled, exported and traced: one graph for the whole forward, and the same graph for any set of the same size."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig

from tests.modeling.test_expert_sets import named_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WAYS = pytest.mark.parametrize(("way", "per_token"), [("auto", 4), ("auto", 2), ("dense", 2), ("grouped_mm", 2)])
SAME_SIZE = [["public", "math"], ["code", "news"], ["public", "news"]]
ROWS = [["public", "math"], ["code"], ["news"]]

# Each of these makes the host wait for the device, or gives a shape that depends on data.
WAITING = (
    "_local_scalar_dense",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique",
    "bincount",
)


class NoWaiting(TorchDispatchMode):
    """Raise on any operation that would wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if any(name == word or name.startswith((f"{word}_", "_unique")) for word in WAITING):
            raise AssertionError(f"{func} waits for the device")
        if name == "index" and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise AssertionError(f"{func} with a mask waits for the device")
        if name == "repeat_interleave" and "Tensor" in func._overloadname and not (kwargs or {}).get("output_size"):
            raise AssertionError(f"{func} of unknown size waits for the device")
        if goes_to_the_host(name, args, kwargs or {}):
            raise AssertionError(f"{func} to the host waits for the device")
        return func(*args, **(kwargs or {}))


def goes_to_the_host(name, args, kwargs):
    if name == "_to_copy":
        source, target = args[0].device, torch.device(kwargs.get("device") or args[0].device)
    elif name == "copy_":
        source, target = args[1].device, args[0].device
    else:
        return False
    return source.type != "cpu" and target.type == "cpu"


class Graphs:
    """A compiler backend that runs graphs as they are and counts them."""

    def __init__(self):
        torch._dynamo.reset()
        self.count = 0

    def __deepcopy__(self, memo):
        return self

    def __call__(self, graph, inputs, **options):
        self.count += 1
        return graph.forward


def ready(way, per_token, device="cpu"):
    model = named_model(per_token).to(device)
    model.set_experts_implementation(way)
    if way == "grouped_mm":
        model.pack_experts()
    return model


@WAYS
@pytest.mark.parametrize("device", DEVICES)
@torch.no_grad()
def test_the_forward_is_one_graph_for_all_sets_of_one_size(input_ids, way, per_token, device):
    model, graphs = ready(way, per_token, device), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    ids = input_ids.to(device)
    for names in SAME_SIZE:
        with model.use_experts(*names):
            found, want = compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        called = compiled(ids, use_cache=False, active_experts=model.select_experts(names)).logits
        torch.testing.assert_close(called, want, atol=1e-5, rtol=1e-5)
    # One for the set in force, one for a set that comes with the call.
    assert graphs.count == 2


@WAYS
@torch.no_grad()
def test_rows_of_different_sets_are_one_graph_too(input_ids, way, per_token):
    model, graphs = ready(way, per_token), Graphs()
    found = torch.compile(model, backend=graphs, fullgraph=True)(input_ids, use_cache=False, active_experts=ROWS).logits

    torch.testing.assert_close(found, model(input_ids, active_experts=ROWS).logits, atol=1e-5, rtol=1e-5)
    assert graphs.count == 1


@WAYS
@pytest.mark.parametrize("device", DEVICES)
def test_generation_with_a_static_cache_compiles_once_for_all_sets_of_one_size(input_ids, way, per_token, device):
    model, graphs = ready(way, per_token, device), Graphs()
    ids = input_ids.to(device)
    compiling = CompileConfig(backend=graphs, fullgraph=True)
    compiling._compile_all_devices = True
    options = {"max_new_tokens": 6, "do_sample": False}
    for names in SAME_SIZE:
        static = {"cache_implementation": "static", "compile_config": compiling}
        found = model.generate(ids, active_experts=names, **options, **static)
        assert torch.equal(found, model.generate(ids, active_experts=names, **options))
        with model.use_experts(*names):
            assert torch.equal(found, model.generate(ids, **options, **static))
    assert graphs.count == 1


@pytest.mark.slow
@WAYS
@torch.no_grad()
def test_the_default_compiler_gives_the_same(input_ids, way, per_token):
    model = ready(way, per_token)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    for rows in (SAME_SIZE[0], ROWS):
        found = compiled(input_ids, use_cache=False, active_experts=rows).logits
        torch.testing.assert_close(found, model(input_ids, active_experts=rows).logits, atol=1e-5, rtol=1e-5)


@WAYS
@torch.no_grad()
def test_the_forward_can_be_exported(input_ids, way, per_token):
    model = ready(way, per_token)
    model.set_active_experts(["public", "math", "news"])
    program = torch.export.export(model, (), {"input_ids": input_ids, "use_cache": False})
    other = torch.flip(input_ids, (1,))
    found = program.module()(input_ids=other, use_cache=False).logits

    torch.testing.assert_close(found, model(other).logits, atol=1e-5, rtol=1e-5)


@WAYS
@pytest.mark.parametrize("sets", [None, ["public", "math", "code"], ROWS], ids=["in force", "call", "rows"])
@pytest.mark.parametrize("device", ["meta", *DEVICES])
@torch.no_grad()
def test_nothing_in_the_forward_waits_for_the_device(input_ids, way, per_token, sets, device):
    model, ids = ready(way, per_token, device), input_ids.to(device)
    if device == "meta":
        # No data, hence nothing that could be read from it; its grouped kernel knows this dtype alone.
        model.bfloat16()
    if way == "auto" and per_token == 2:
        model.set_experts_implementation("dense")
    selection = model.select_experts(sets)
    cache = model(ids[:, :-1], active_experts=selection).past_key_values
    # Four dimensions, as `generate` gives with a static cache: upstream reads masks of two on the host.
    mask = torch.ones(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool, device=device).tril()
    with NoWaiting():
        model(ids, use_cache=False, active_experts=selection, attention_mask=mask)
        model(ids[:, -1:], past_key_values=cache, active_experts=selection, attention_mask=mask[:, :, -1:])


def test_the_watch_sees_what_waits(input_ids):
    model = named_model(2)
    model.set_experts_implementation("eager")
    with pytest.raises(AssertionError, match="waits"), NoWaiting(), torch.no_grad():
        model(input_ids, use_cache=False)


@pytest.mark.parametrize(
    "waiting",
    [
        # A tensor without data stands for one on an accelerator: the watch speaks before anything is copied.
        lambda away: away.cpu(),
        lambda away: away.tolist(),
        lambda away: away.to("cpu", torch.float16),
        lambda away: torch.ones(3).copy_(away),
        lambda away: torch.ones(3).repeat_interleave(torch.tensor([1, 2, 3])),
        lambda away: torch.repeat_interleave(torch.tensor([1, 2])),
    ],
    ids=["cpu", "tolist", "to", "copy_", "repeats", "repeats alone"],
)
def test_the_watch_sees_copies_to_the_host_and_sizes_that_depend_on_data(waiting):
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        waiting(torch.ones(3, device="meta"))


def test_the_watch_lets_pass_what_does_not_wait():
    away = torch.ones(3, device="meta")
    with NoWaiting():
        away.half().copy_(torch.ones(3).to("meta"))
        torch.ones(3).half().repeat_interleave(2)
        torch.ones(3).repeat_interleave(torch.tensor([1, 2, 3]), output_size=6)


@torch.no_grad()
def test_a_live_switch_changes_what_an_already_compiled_forward_computes(input_ids):
    model, graphs = ready("auto", 4), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    model.set_active_experts(["public", "math"])
    first = compiled(input_ids, use_cache=False).logits
    model.set_active_experts(["public", "news"])
    second = compiled(input_ids, use_cache=False).logits

    assert not torch.allclose(first, second)
