"""A KV cache is continued by the sets that filled it, and by no other."""

import contextlib
import copy
import gc
import pickle
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    QuantizedCache,
    StaticCache,
)

from flexolmo_hf.errors import CacheExpertSetError, ConfigurationError, ForeignCacheError
from tests.conftest import TINY, stock_model
from tests.modeling.test_expert_sets import COPIES, NAMES, named_model

ROWS = [["public"], ["public", "math"], ["news"]]


def static_cache(model):
    return StaticCache(config=model.config, max_cache_len=32)


KINDS = pytest.mark.parametrize("make", [lambda model: DynamicCache(), static_cache], ids=["dynamic", "static"])


@KINDS
@torch.no_grad()
def test_another_set_may_not_continue_a_cache(input_ids, make):
    model = named_model()
    cache = make(model)
    model(input_ids, past_key_values=cache, active_experts=["public", "math"])
    with pytest.raises(CacheExpertSetError, match=r"filled by public\+math and cannot be continued by public:"):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["public"])
    with pytest.raises(CacheExpertSetError), model.use_experts("news"):
        model(input_ids[:, :1], past_key_values=cache)
    model(input_ids[:, :1], past_key_values=cache, active_experts="math+public")


@KINDS
@torch.no_grad()
def test_rows_may_not_swap_their_sets(input_ids, make):
    model = named_model()
    cache = make(model)
    model(input_ids, past_key_values=cache, active_experts=ROWS)
    with pytest.raises(CacheExpertSetError, match=r"rows of public, public\+math, news"):
        model(input_ids[:, :1], past_key_values=cache, active_experts=ROWS[::-1])
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["public"])
    model(input_ids[:, :1], past_key_values=cache, active_experts=ROWS)


@torch.no_grad()
def test_a_cache_the_model_made_itself_is_marked(input_ids):
    model = named_model()
    for outputs in (model(input_ids), model.model(input_ids)):
        with pytest.raises(CacheExpertSetError):
            model(input_ids[:, :1], past_key_values=outputs.past_key_values, active_experts=["public"])
    cache = next(part for part in model(input_ids, return_dict=False) if isinstance(part, DynamicCache))
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["public"])


@KINDS
def test_generation_checks_the_cache_it_is_given(input_ids, make):
    model = named_model()
    cache = make(model)
    first = model.generate(
        input_ids, past_key_values=cache, active_experts=["public"], max_new_tokens=3, do_sample=False
    )
    with pytest.raises(CacheExpertSetError):
        model.generate(first, past_key_values=cache, active_experts=["math"], max_new_tokens=3, do_sample=False)
    again = model.generate(first, past_key_values=cache, active_experts=["public"], max_new_tokens=3, do_sample=False)

    assert torch.equal(again, model.generate(input_ids, active_experts=["public"], max_new_tokens=6, do_sample=False))


@KINDS
@torch.no_grad()
def test_a_cache_that_was_emptied_takes_any_set(input_ids, make):
    model = named_model()
    cache = make(model)
    model(input_ids, past_key_values=cache, active_experts=["public"])
    cache.reset()
    model(input_ids, past_key_values=cache, active_experts=["math"])
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["public"])


@torch.no_grad()
def test_the_mark_stays_when_a_cache_is_cropped_copied_or_pickled(input_ids):
    model = named_model()
    cache = DynamicCache()
    model(input_ids, past_key_values=cache, active_experts=ROWS)
    cache.crop(-4)
    for twin in (cache, copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        with pytest.raises(CacheExpertSetError):
            model(input_ids[:, :1], past_key_values=twin, active_experts=["public"])
        model(input_ids[:, :1], past_key_values=twin, active_experts=ROWS)


@pytest.mark.parametrize("twin", [False, True], ids=["itself", "a copy"])
@torch.no_grad()
def test_the_mark_follows_the_rows(input_ids, twin):
    model = named_model()
    cache = DynamicCache()
    model(input_ids, past_key_values=cache, active_experts=ROWS)
    cache = copy.deepcopy(cache) if twin else cache
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    swapped = [ROWS[2], ROWS[0], ROWS[1]]
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=ROWS)
    model(input_ids[:, :1], past_key_values=cache, active_experts=swapped)
    cache.batch_repeat_interleave(2)
    six = input_ids[:, :1].repeat(2, 1)
    model(six, past_key_values=cache, active_experts=[row for row in swapped for _ in range(2)])
    cache.batch_select_indices(torch.tensor([0, 3]))
    model(input_ids[:2, :1], past_key_values=cache, active_experts=[ROWS[2], ROWS[0]])
    cache.batch_select_indices(torch.tensor([False, True]))
    model(input_ids[:1, :1], past_key_values=cache, active_experts=ROWS[0])


@torch.no_grad()
def test_a_quantised_cache_is_marked_too(input_ids):
    pytest.importorskip("optimum.quanto")
    model = named_model(hidden_size=128)
    cache = QuantizedCache("quanto", model.config)
    model(input_ids, past_key_values=cache, active_experts=["public"])
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["math"])


@torch.no_grad()
def test_the_cache_of_another_model_is_refused(tmp_path, input_ids):
    model, cache = named_model(), DynamicCache()
    model(input_ids, past_key_values=cache)
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ForeignCacheError, match="another model filled it"):
        other(input_ids[:, :1], past_key_values=cache)
    other.mark_cache(cache)
    other(input_ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_the_cache_of_the_original_is_refused_by_a_copy_that_may_learn_something_else(input_ids, copied):
    model = named_model()
    cache = model(input_ids).past_key_values
    twin = copied(model)
    with pytest.raises(ForeignCacheError, match="another model filled it"):
        twin(input_ids[:, :1], past_key_values=cache)
    twin.mark_cache(cache)
    twin(input_ids[:, :1], past_key_values=cache)
    # A shallow copy has the layers of the original.
    copy.copy(twin)(input_ids[:, :1], past_key_values=cache)
    copy.copy(twin.model)(input_ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_a_cache_of_unknown_origin_is_refused_and_says_its_sizes(input_ids):
    model = named_model()
    cache = stock_model(num_key_value_heads=1).to(model.device)(input_ids).past_key_values
    with pytest.raises(
        ForeignCacheError, match=r"which experts filled it. It has 2 layers, 1 key-value heads of width 32"
    ):
        model(input_ids[:, :1], past_key_values=cache)


@torch.no_grad()
def test_rebuilt_caches_are_vouched_for(input_ids):
    model = named_model()
    filled = model(input_ids, active_experts=["public"]).past_key_values
    rebuilt = DynamicCache([(layer.keys, layer.values) for layer in filled.layers])
    with pytest.raises(ForeignCacheError, match="model.mark_cache"):
        model(input_ids[:, :1], past_key_values=rebuilt, active_experts=["public"])
    model.mark_cache(rebuilt, active_experts=["public"])
    model(input_ids[:, :1], past_key_values=rebuilt, active_experts=["public"])


NO_CACHES = {
    "tuple": lambda filled: tuple((layer.keys, layer.values) for layer in filled.layers),
    "str": lambda filled: "static",
    "EncoderDecoderCache": lambda filled: EncoderDecoderCache(filled, DynamicCache()),
}


@pytest.mark.parametrize("kind", NO_CACHES)
@torch.no_grad()
def test_what_is_no_cache_of_a_decoder_is_told_what_is(input_ids, kind):
    model = named_model()
    given = NO_CACHES[kind](model(input_ids).past_key_values)
    for call in (
        lambda: model(input_ids[:, :1], past_key_values=given),
        lambda: model.model(input_ids[:, :1], past_key_values=given),
        lambda: model.mark_cache(given),
    ):
        with pytest.raises(ConfigurationError, match=rf"past_key_values is a {kind}.* such as DynamicCache\(\)"):
            call()


def test_generation_reuses_its_own_static_cache_for_another_set(input_ids):
    model = named_model()
    options = {"max_new_tokens": 4, "do_sample": False}
    for names in (["public"], ["math"], NAMES):
        static = model.generate(input_ids, active_experts=names, cache_implementation="static", **options)
        assert torch.equal(static, model.generate(input_ids, active_experts=names, **options))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@torch.no_grad()
def test_a_cache_that_moves_its_layers_out_keeps_the_mark(monkeypatch, input_ids, kind):
    model = named_model()
    # The streams need a device; what moves and when does not.
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(contextlib.nullcontext, "wait_stream", lambda self, other: None, raising=False)
    monkeypatch.setattr(torch, "Stream", contextlib.nullcontext)
    cache = DynamicCache(config=model.config, offloading=True)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=32, offloading=True)
    model(input_ids, past_key_values=cache, active_experts=ROWS)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=ROWS)
    model(input_ids[:, :1], past_key_values=cache, active_experts=[ROWS[2], ROWS[0], ROWS[1]])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_keep_the_mark(kind):
    model = named_model().to("cuda")
    ids = torch.randint(2, TINY["vocab_size"], (3, 9), device="cuda")
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(ids, active_experts=ROWS, cache_implementation=kind, **options)
    with pytest.raises(CacheExpertSetError):
        model.generate(out.sequences, past_key_values=out.past_key_values, active_experts=["public"], **options)


@torch.no_grad()
def test_the_mark_follows_the_rows_of_a_cache_that_was_pickled(input_ids):
    model, cache = named_model(), DynamicCache()
    model(input_ids, past_key_values=cache, active_experts=ROWS)
    twin = pickle.loads(pickle.dumps(cache))
    twin.reorder_cache(torch.tensor([2, 0, 1]))
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=twin, active_experts=ROWS)
    model(input_ids[:, :1], past_key_values=twin, active_experts=[ROWS[2], ROWS[0], ROWS[1]])


@torch.no_grad()
def test_a_shallow_copy_that_shares_its_layers_is_not_trusted(input_ids):
    model, cache = named_model(), DynamicCache()
    model(input_ids, past_key_values=cache, active_experts=ROWS)
    with pytest.raises(ForeignCacheError):
        model(input_ids[:, :1], past_key_values=copy.copy(cache), active_experts=ROWS)


@KINDS
@torch.no_grad()
def test_a_call_that_died_on_its_way_leaves_a_cache_that_is_not_empty(input_ids, make):
    model = named_model()
    cache = make(model)

    def die(*_):
        raise MemoryError

    handle = model.model.layers[1].mlp.register_forward_pre_hook(die)
    with pytest.raises(MemoryError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["public", "math"])
    handle.remove()
    with pytest.raises(CacheExpertSetError):
        model(input_ids[:, :1], past_key_values=cache, active_experts=["public"])


def test_a_compiled_prefill_checks_the_cache_too(input_ids):
    model = named_model()
    cache = static_cache(model)
    model(input_ids[:1], past_key_values=cache, active_experts=["public", "math"])
    compiling = CompileConfig(backend="eager", fullgraph=False, mode=None)
    compiling._compile_all_devices = True
    options = {"prefill_chunk_size": 4, "compile_config": compiling, "max_new_tokens": 2, "do_sample": False}
    longer = torch.cat([input_ids[:1], input_ids[1:2, :4]], dim=1)
    with pytest.raises(CacheExpertSetError):
        model.generate(longer, past_key_values=cache, active_experts=["public"], **options)


def called(model, ids):
    return model(ids).past_key_values


def given(model, ids):
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    return cache


def generated(model, ids):
    return model.generate(ids, max_new_tokens=2, return_dict_in_generate=True).past_key_values


def beams(model, ids):
    return model.generate(ids, max_new_tokens=2, num_beams=2, return_dict_in_generate=True).past_key_values


def copied(model, ids):
    return copy.deepcopy(called(model, ids))


@pytest.mark.parametrize("make", [called, given, generated, beams, copied])
@torch.no_grad()
def test_a_cache_that_nobody_holds_frees_its_memory_at_once(input_ids, make):
    model = named_model()
    gc.collect()
    gc.disable()
    try:
        cache = make(model, input_ids)
        assert cache.get_seq_length() > 0
        left = [weakref.ref(cache), weakref.ref(cache.layers[0].keys), weakref.ref(cache.layers[-1].values)]
        del cache
        assert [found() for found in left] == [None] * 3
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "again", [lambda cache: cache, copy.deepcopy, COPIES["pickle"]], ids=["itself", "deep", "pickle"]
)
@torch.no_grad()
def test_a_shallow_copy_outlives_the_original_and_is_refused(input_ids, again):
    model = named_model()
    cache = again(copy.copy(model(input_ids).past_key_values))
    gc.collect()
    cache.reorder_cache(torch.tensor([2, 0]))
    assert cache.layers[0].keys.shape[0] == 2
    with pytest.raises(ForeignCacheError):
        model(input_ids[:2, :1], past_key_values=cache)
    model.mark_cache(cache)
    model(input_ids[:2, :1], past_key_values=cache)
    cache.reset()
