"""A cache with room to grow holds what upstream's holds, and never writes over what it handed out."""

import copy
import pickle

import pytest
import torch
from transformers import DynamicCache, StaticCache

from flexolmo_hf.modeling.cache_growth import GrowingLayer, let_grow
from tests.modeling.test_expert_sets import named_model


def states(tokens, batch=2):
    return torch.randn(batch, 2, tokens, 8), torch.randn(batch, 2, tokens, 8)


def plain_and_growing(layers=1):
    growing = DynamicCache()
    let_grow(growing)
    return DynamicCache(), growing


def update(caches, tokens, batch=2):
    keys, values = states(tokens, batch)
    return [cache.update(keys, values, 0) for cache in caches]


def assert_same(plain, growing):
    assert type(growing.layers[0]) is GrowingLayer
    assert growing.get_seq_length() == plain.get_seq_length()
    assert torch.equal(growing.layers[0].keys, plain.layers[0].keys)
    assert torch.equal(growing.layers[0].values, plain.layers[0].values)


@torch.no_grad()
def test_it_returns_and_holds_what_upstreams_does():
    caches = plain_and_growing()
    for tokens in (5, 1, 1, 3, 200, 1, 90, 1, 1):
        (keys, values), (grown_keys, grown_values) = update(caches, tokens)
        assert torch.equal(keys, grown_keys)
        assert torch.equal(values, grown_values)
        assert_same(*caches)


@torch.no_grad()
def test_a_token_more_copies_nothing():
    _, cache = plain_and_growing()
    addresses = set()
    for _ in range(60):
        update([cache], 1)
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 1


@torch.no_grad()
def test_the_room_grows_with_the_text():
    _, cache = plain_and_growing()
    moves, address = 0, None
    for _ in range(3000):
        update([cache], 1, batch=1)
        moves += address != cache.layers[0].keys.data_ptr()
        address = cache.layers[0].keys.data_ptr()
        room = cache.layers[0].keys.untyped_storage().nbytes() / cache.layers[0].keys.nbytes
        assert cache.get_seq_length() < 300 or room < 1.3
    assert moves < 25


CHANGES = {
    "crop": lambda cache: cache.crop(-3),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([1, 0])),
    "select": lambda cache: cache.batch_select_indices(torch.tensor([0, 1])),
    "repeat": lambda cache: cache.batch_repeat_interleave(1),
    "reset": lambda cache: cache.reset(),
    "replace": lambda cache: setattr(cache.layers[0], "keys", cache.layers[0].keys.clone()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@torch.no_grad()
def test_whoever_changes_the_rows_changes_no_memory_of_others(change):
    caches = plain_and_growing()
    for tokens in (5, 1, 1, 1):
        handed_out = update(caches, tokens)[1]
    before = [tensor.clone() for tensor in handed_out]
    for cache in caches:
        change(cache)
    for tokens in (2, 1, 1, 1):
        update(caches, tokens)
        assert_same(*caches)
    assert all(torch.equal(now, then) for now, then in zip(handed_out, before, strict=True))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))], ids=["copy", "pickle"]
)
@torch.no_grad()
def test_a_copy_goes_its_own_way(copied):
    caches = plain_and_growing()
    for tokens in (5, 1, 1):
        update(caches, tokens)
    others = [copied(cache) for cache in caches]
    for _ in range(3):
        update(caches, 1)
        update(others, 1)
        assert_same(*caches)
        assert_same(*others)
    assert not torch.equal(caches[1].layers[0].keys, others[1].layers[0].keys)


@torch.no_grad()
def test_a_shallow_copy_of_a_layer_goes_its_own_way():
    _, cache = plain_and_growing()
    for tokens in (5, 1, 1):
        update([cache], tokens)
    layer = cache.layers[0]
    other = copy.copy(layer)
    mine, theirs = states(1), states(1)
    layer.update(*mine)
    other.update(*theirs)
    assert torch.equal(layer.keys[..., -1:, :], mine[0])
    assert torch.equal(other.keys[..., -1:, :], theirs[0])


def test_with_gradient_it_grows_as_upstreams_does():
    caches = plain_and_growing()
    keys, values = states(3)
    for cache in caches:
        cache.update(keys, values, 0)
    weight = torch.ones((), requires_grad=True)
    for _ in range(2):
        for cache in caches:
            result, _ = cache.update(keys * weight, values, 0)
    result.sum().backward()
    assert weight.grad is not None
    assert_same(*caches)


def test_memory_of_inference_mode_is_not_written_outside_of_it():
    caches = plain_and_growing()
    with torch.inference_mode():
        for tokens in (5, 1, 1):
            update(caches, tokens)
    with torch.no_grad():
        for _ in range(3):
            update(caches, 1)
            assert_same(*caches)


@torch.no_grad()
def test_forgotten_memory_is_let_go():
    _, cache = plain_and_growing()
    for tokens in (5, 1, 1):
        update([cache], tokens)
    layer = cache.layers[0]
    cache.reset()
    assert layer._buffers is None
    assert layer._returned is None
    for tokens in (5, 1, 1):
        update([cache], tokens)
    cache.crop(-1)
    update([cache], 1)
    assert layer._buffers is None


@torch.no_grad()
def test_the_model_lets_plain_caches_grow_and_no_others(input_ids):
    model = named_model()
    for cache in (DynamicCache(), DynamicCache(config=model.config), None):
        cache = model(input_ids, past_key_values=cache).past_key_values
        assert {type(layer) for layer in cache.layers} == {GrowingLayer}
        model(input_ids[:, :1], past_key_values=cache)
        model(input_ids[:, :1], past_key_values=cache)
        assert cache.layers[0]._buffers is not None

    class Special(DynamicCache):
        pass

    for cache in (Special(), StaticCache(config=model.config, max_cache_len=32)):
        model(input_ids, past_key_values=cache)
        assert GrowingLayer not in {type(layer) for layer in cache.layers}


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "beams", "lookup"]
)
def test_generation_gives_the_same_tokens(monkeypatch, input_ids, options):
    model = named_model()
    options = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, **options}
    rows = input_ids[:1] if "prompt_lookup_num_tokens" in options else input_ids
    growing = model.generate(rows, **options)
    monkeypatch.setattr("flexolmo_hf.modeling.model.let_grow", lambda cache: None)
    assert torch.equal(growing, model.generate(rows, **options))
