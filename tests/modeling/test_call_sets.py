"""A call brings its own sets, one for the batch or one per row, and no row feels another row's experts."""

import copy
import threading

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache, pipeline

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import (
    ConfigurationError,
    DuplicateExpertError,
    EmptyExpertSetError,
    ExpertNotLoadedError,
    ExpertRowsError,
    ExpertsChangedError,
    ExpertTypeError,
    UnknownExpertError,
)
from flexolmo_hf.modeling.arguments import known_arguments, refuse_unknown
from tests.conftest import TINY, dense_model
from tests.modeling.test_expert_sets import COPIES, NAMES, named_model, poison

SETS = [["public"], ["public", "math"], ["code", "news"]]
PER_TOKEN = pytest.mark.parametrize("per_token", [4, 2, 1], ids=["all of 4", "2 of 4", "1 of 4"])
WAYS = pytest.mark.parametrize("way", ["auto", "dense", "eager", "grouped_mm", "batched_mm"])
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True},
    "several sequences": {"num_return_sequences": 2, "do_sample": True},
    "beams returned": {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
    "static cache": {"cache_implementation": "static", "do_sample": False},
    "no cache": {"use_cache": False, "do_sample": False},
    "chunked prefill": {"prefill_chunk_size": 4, "do_sample": False},
    "guidance": {"guidance_scale": 1.5, "do_sample": False},
}
ONE_ROW_MODES = {"prompt lookup": {"prompt_lookup_num_tokens": 3}, "early exit": {"assistant_early_exit": 1}}


def prompts():
    """Return two prompts with left padding and one without, and their mask."""
    ids = torch.randint(2, TINY["vocab_size"], (3, 9))
    ids[0, :3] = ids[1, :5] = TINY["pad_token_id"]
    return {"input_ids": ids, "attention_mask": (ids != TINY["pad_token_id"]).long()}


def row(batch, number):
    return {key: value[number : number + 1] for key, value in batch.items()}


@WAYS
@PER_TOKEN
@torch.no_grad()
def test_a_set_for_a_call_equals_the_set_in_force(input_ids, per_token, way):
    model = named_model(per_token)
    model.set_experts_implementation(way)
    for names in SETS:
        called = model(input_ids, active_experts=names).logits
        with model.use_experts(*names):
            assert torch.equal(called, model(input_ids).logits)
    assert model.active_experts == NAMES


@WAYS
@PER_TOKEN
@torch.no_grad()
def test_each_row_computes_what_it_would_alone(per_token, way):
    model, batch = named_model(per_token), prompts()
    model.set_experts_implementation(way)
    together = model(**batch, active_experts=SETS).logits
    for number, names in enumerate(SETS):
        alone = model(**row(batch, number), active_experts=names).logits
        seen = batch["attention_mask"][number].bool()
        torch.testing.assert_close(together[number, seen], alone[0, seen], atol=1e-5, rtol=1e-5)


@WAYS
@PER_TOKEN
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_row_never_feels_an_expert_of_another_row(per_token, way, bias):
    model, batch = named_model(per_token, router_bias=bias), prompts()
    model.set_experts_implementation(way)
    clean = model(**batch, active_experts=SETS).logits
    # Everything the first row may not use: an empty slot must not be filled with any of it.
    poison(model, ["math", "code", "news"])
    poisoned = model(**batch, active_experts=SETS).logits

    # Where tokens choose, a poisoned row chooses otherwise and shares other products, so the last bit may move.
    torch.testing.assert_close(
        clean[0], poisoned[0], atol=0 if per_token == 4 and way in ("auto", "dense") else 1e-5, rtol=0
    )
    assert poisoned[1:][:, -1].isnan().all()


@PER_TOKEN
def test_gradients_of_a_row_never_feel_an_expert_of_another_row(per_token):
    model, batch = named_model(per_token), prompts()
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()

    def gradient():
        inputs = embedded.clone().requires_grad_()
        model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], active_experts=SETS).logits[
            0
        ].sum().backward()
        return inputs.grad[0]

    clean = gradient()
    poison(model, ["math", "code", "news"])
    torch.testing.assert_close(gradient(), clean, atol=1e-5, rtol=1e-5)


@PER_TOKEN
def test_gradients_of_all_rows_never_feel_an_expert_that_none_may_use(per_token):
    model, batch = named_model(per_token), prompts()
    sets = [["public"], ["public", "math"], ["public"]]

    def gradients():
        model.zero_grad()
        model(**batch, active_experts=sets, labels=batch["input_ids"]).loss.backward()
        used = [*model.expert_modules("public"), *model.expert_modules("math"), model.lm_head, model.model.embed_tokens]
        rows = [mixture.gate.weight.grad[:2].clone() for mixture in model.mixtures]
        # With one expert per token, an expert may have had none.
        return rows + [p.grad.clone() for module in used for p in module.parameters() if p.grad is not None]

    clean = gradients()
    poison(model, ["code", "news"])
    for before, after in zip(clean, gradients(), strict=True):
        assert after.isfinite().all()
        assert torch.equal(before, after)


def test_training_on_rows_with_different_rights_moves_what_they_share():
    model, batch = named_model(), prompts()
    model(
        **batch, labels=batch["input_ids"], active_experts=[["public"], ["public", "math"], ["public"]]
    ).loss.backward()

    def moved(name):
        return all(
            p.grad is not None and p.grad.abs().sum() > 0 for e in model.expert_modules(name) for p in e.parameters()
        )

    assert moved("public")
    assert moved("math")
    assert all(p.grad is None for e in model.expert_modules("code") for p in e.parameters())


def test_gradient_checkpointing_keeps_the_sets_of_a_call():
    model, batch = named_model().train(), prompts()
    with torch.no_grad():
        want = model(**batch, active_experts=SETS, labels=batch["input_ids"]).loss
    model.gradient_checkpointing_enable()
    loss = model(**batch, active_experts=SETS, labels=batch["input_ids"]).loss
    loss.backward()

    torch.testing.assert_close(loss, want)
    assert all(p.grad is not None for e in model.expert_modules("news") for p in e.parameters())


@pytest.mark.parametrize("mode", MODES)
@PER_TOKEN
def test_generation_of_a_row_never_feels_an_expert_of_another_row(mode, per_token):
    model, batch = named_model(per_token), prompts()
    options = {"max_new_tokens": 6, **MODES[mode]}

    def generate():
        torch.manual_seed(3)
        return model.generate(**batch, active_experts=sets, **options)

    sets = [["public"], ["public", "math"], ["public"]]
    clean = generate()
    poison(model, ["code", "news"])
    assert torch.equal(clean, generate())


@pytest.mark.parametrize("mode", ["greedy", "static cache", "no cache"])
@PER_TOKEN
def test_a_row_generates_the_same_beside_a_poisoned_one(mode, per_token):
    model, batch = named_model(per_token), prompts()
    options = {"max_new_tokens": 6, **MODES[mode]}
    clean = model.generate(**batch, active_experts=SETS, **options)
    poison(model, ["math"])
    poisoned = model.generate(**batch, active_experts=SETS, **options)

    assert torch.equal(clean[[0, 2]], poisoned[[0, 2]])
    assert not torch.equal(clean[1], poisoned[1])


@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache", "no cache", "guidance"])
@PER_TOKEN
def test_a_row_generates_the_same_tokens_alone_and_in_a_batch(mode, per_token):
    model, batch = named_model(per_token), prompts()
    options = {"max_new_tokens": 8, "min_new_tokens": 8, **MODES[mode]}
    together = model.generate(**batch, active_experts=SETS, **options)
    for number, names in enumerate(SETS):
        alone = model.generate(**row(batch, number), active_experts=names, **options)
        assert torch.equal(together[number], alone[0])


@pytest.mark.parametrize("mode", ONE_ROW_MODES)
@PER_TOKEN
def test_assisted_generation_keeps_to_the_set(mode, per_token):
    model = named_model(per_token)
    ids = torch.randint(2, TINY["vocab_size"], (1, 9)).repeat(1, 2)
    options = {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, active_experts=["public", "math"], **options)
    poison(model, ["code", "news"])
    assert torch.equal(plain, model.generate(ids, active_experts=["public", "math"], **options, **ONE_ROW_MODES[mode]))


def test_an_assistant_uses_no_more_than_the_set(tmp_path):
    model = named_model()
    model.save_pretrained(tmp_path)
    ids, options = torch.randint(2, TINY["vocab_size"], (1, 9)), {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, active_experts=["public", "math"], **options)
    helper = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["public", "code"])
    poison(helper, ["code"])

    assert torch.equal(plain, model.generate(ids, active_experts=["public", "math"], assistant_model=helper, **options))
    stranger = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["news"])
    with pytest.raises(EmptyExpertSetError):
        model.generate(ids, active_experts=["public", "math"], assistant_model=stranger, **options)


def test_a_dense_assistant_knows_nothing_of_sets():
    model, assistant = named_model(), dense_model()
    ids, options = torch.randint(2, TINY["vocab_size"], (1, 9)), {"max_new_tokens": 8, "do_sample": False}
    plain = model.generate(ids, active_experts=["math"], **options)

    assert torch.equal(plain, model.generate(ids, active_experts=["math"], assistant_model=assistant, **options))


def test_rows_that_finish_early_leave_the_others_alone():
    model, batch = named_model(), prompts()
    long = model.generate(**batch, active_experts=SETS, max_new_tokens=12, do_sample=False)
    stop = int(long[0, 11])
    short = model.generate(**batch, active_experts=SETS, max_new_tokens=12, do_sample=False, eos_token_id=stop)
    for number, names in enumerate(SETS):
        alone = model.generate(
            **row(batch, number), active_experts=names, max_new_tokens=12, do_sample=False, eos_token_id=stop
        )[0]
        assert torch.equal(short[number, : len(alone)], alone)
        assert (short[number, len(alone) :] == TINY["pad_token_id"]).all()


def test_a_running_generation_keeps_the_set_it_began_with():
    model, ids = named_model(), torch.randint(2, TINY["vocab_size"], (1, 9))
    with model.use_experts("public"):
        want = model.generate(ids, max_new_tokens=6, do_sample=False)

    class Meddler:
        def put(self, value):
            model.set_active_experts(["news"])

        def end(self):
            pass

    model.set_active_experts(["public"])
    assert torch.equal(want, model.generate(ids, max_new_tokens=6, do_sample=False, streamer=Meddler()))


def test_threads_that_share_a_model_keep_their_own_sets():
    model, ids = named_model(), torch.randint(2, TINY["vocab_size"], (1, 9))
    want = {"+".join(s): model.generate(ids, active_experts=s, max_new_tokens=12, do_sample=False) for s in SETS}
    found = {}

    def serve(names):
        found["+".join(names)] = [
            model.generate(ids, active_experts=names, max_new_tokens=12, do_sample=False) for _ in range(3)
        ]

    threads = [threading.Thread(target=serve, args=(names,)) for names in SETS]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(want[key], result) for key, results in found.items() for result in results)


@pytest.mark.parametrize("mask", [[True, False, True, False], [[True, False, True, False]] * 3], ids=["one", "rows"])
@torch.no_grad()
def test_a_mask_says_the_same_as_names(input_ids, mask):
    model = named_model()
    named = model(input_ids, active_experts=["public", "code"]).logits

    assert torch.equal(model(input_ids, active_experts=torch.tensor(mask)).logits, named)


@torch.no_grad()
def test_none_for_a_row_means_the_set_in_force(input_ids):
    model = named_model()
    model.set_active_experts(["math"])
    rows = model(input_ids, active_experts=[None, ["news"], None]).logits

    assert torch.equal(rows, model(input_ids, active_experts=[["math"], ["news"], ["math"]]).logits)
    assert torch.equal(model(input_ids, active_experts=None).logits, model(input_ids, active_experts=["math"]).logits)


@torch.no_grad()
def test_a_plus_joins_names_in_a_call_too(input_ids):
    model = named_model()

    assert torch.equal(
        model(input_ids, active_experts="public+math").logits,
        model(input_ids, active_experts=["math", "public"]).logits,
    )


@torch.no_grad()
def test_router_logits_keep_their_meaning(input_ids):
    model = named_model()
    one = model(input_ids, active_experts=["public", "code"], output_router_logits=True)
    rows = model(input_ids, active_experts=SETS, output_router_logits=True)

    assert [logits.shape for logits in one.router_logits] == [(33, 2)] * 2
    assert [logits.shape for logits in rows.router_logits] == [(33, 4)] * 2
    first = rows.router_logits[0].view(3, 11, 4)
    assert first[0, :, 1:].isneginf().all()
    assert first[2].isfinite().all(dim=0).tolist() == [False, False, True, True]
    assert rows.aux_loss.isfinite()
    assert one.aux_loss.isfinite()


def test_the_pipeline_passes_a_set_through(tokenizer):
    model = named_model(vocab_size=len(tokenizer))
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    want = model.generate(
        **tokenizer("two", return_tensors="pt"), active_experts=["math"], max_new_tokens=5, do_sample=False
    )
    poison(model, ["public", "code", "news"])

    found = generator("two", active_experts=["math"], **options)[0]["generated_text"]
    assert found == tokenizer.decode(want[0, 3:], skip_special_tokens=True)
    rows = generator(["two", "six"], active_experts=[["math"], ["math"]], batch_size=2, **options)
    assert rows[0][0]["generated_text"] == found


@pytest.mark.parametrize(
    ("given", "kind", "says"),
    [
        ([["public"], ["math"]], ExpertRowsError, "2 sets of experts for 3 rows"),
        ([["public"], [], ["math"]], EmptyExpertSetError, "empty"),
        ([], EmptyExpertSetError, "empty"),
        ([["public"], ["maths"], ["math"]], UnknownExpertError, "Did you mean 'math'"),
        ([["public"], "math", ["math"]], ExpertTypeError, "'math'"),
        ([["public"], 1, ["math"]], ExpertTypeError, "called 'math'"),
        ([["public", "public"], ["math"], ["math"]], DuplicateExpertError, "twice"),
        (3, ExpertTypeError, "not an expert name"),
        ({"public": True, "math": False}, ExpertTypeError, "not an expert name"),
        ([{"public": 1}, ["math"], ["math"]], ExpertTypeError, "not an expert name"),
        (torch.ones(3, 5, dtype=torch.bool), ExpertRowsError, r"\(3, 5\)"),
        (torch.ones(2, 4, dtype=torch.bool), ExpertRowsError, "2 sets"),
        (torch.ones(3, 4), ExpertRowsError, "float32"),
        (torch.zeros(3, 4, dtype=torch.bool), EmptyExpertSetError, "empty"),
    ],
)
@pytest.mark.parametrize("call", ["forward", "generate", "backbone"])
def test_a_set_that_does_not_fit_is_refused_before_anything_runs(input_ids, given, kind, says, call):
    model = named_model()
    run = {"forward": model, "generate": model.generate, "backbone": model.model}[call]
    with pytest.raises(kind, match=says):
        run(input_ids, active_experts=given)


def test_an_expert_that_is_not_in_memory_is_told_from_one_that_does_not_exist(tmp_path, input_ids):
    named_model().save_pretrained(tmp_path)
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["public", "math"])
    with pytest.raises(ExpertNotLoadedError, match="load_expert"):
        model(input_ids, active_experts=[["public"], ["news"], None])
    with pytest.raises(UnknownExpertError):
        model(input_ids, active_experts=["sports"])


def test_continuous_batching_serves_no_set_of_its_own(input_ids):
    model = named_model()
    with pytest.raises(ConfigurationError, match="set in force"):
        model.generate(input_ids, active_experts=["public"], cache_implementation="paged")
    with pytest.raises(ConfigurationError, match="set in force"):
        model.generate_batch(input_ids.tolist(), active_experts=["public"])
    with pytest.raises(ConfigurationError, match="no longer than a call"):
        model.generate_batch(input_ids.tolist(), persistent_manager=True)


@pytest.mark.parametrize("call", ["generate", "generate_batch"])
@pytest.mark.parametrize("where", ["given", "given first", "the model's"])
def test_a_set_among_the_settings_of_generation_is_refused(input_ids, where, call):
    # The host would take the keyword of the call for a change of these settings, and run all experts.
    model, settings = named_model(), GenerationConfig(max_new_tokens=2, active_experts=["math"])
    positional, keywords = (), {}
    if where == "the model's":
        model.generation_config = settings
    elif where == "given":
        keywords = {"generation_config": settings}
    else:
        positional = (settings,)
    inputs = input_ids if call == "generate" else input_ids.tolist()
    for sets in ({}, {"active_experts": ["public"]}):
        with pytest.raises(ConfigurationError, match="active_experts stands in a GenerationConfig"):
            getattr(model, call)(inputs, *positional, **keywords, **sets)


def test_what_continuous_batching_passes_is_known():
    keywords = pytest.importorskip("transformers.generation.continuous_batching.input_outputs").PagedAttentionArgs
    refuse_unknown(keywords.__annotations__, known_arguments(FlexOlmoForCausalLM.forward))


@pytest.mark.slow
def test_continuous_batching_serves_the_set_in_force():
    model = named_model()
    prompts = torch.randint(2, TINY["vocab_size"], (2, 9))
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": -1}
    with model.use_experts("public", "math"):
        want = model.generate(prompts, **options)
        poison(model, ["code", "news"])
        found = model.generate_batch(
            prompts.tolist(), generation_config=GenerationConfig(**options), progress_bar=False
        )
    written = sorted(result.generated_tokens for result in found.values())
    assert written == sorted(row.tolist() for row in want[:, 9:])


def test_a_copy_of_a_model_keeps_its_set_and_its_own_experts(input_ids):
    model = named_model()
    model.set_active_experts(["public", "math"])
    twin = copy.deepcopy(model)
    poison(model, ["public"])

    assert twin.active_experts == ["public", "math"]
    assert twin(input_ids).logits.isfinite().all()
    poison(twin, ["code"])
    assert twin(input_ids).logits.isfinite().all()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("sets", [["public", "math"], [["public"], ["public", "math"]]], ids=["one", "rows"])
@torch.no_grad()
def test_a_copy_computes_its_own_experts_and_refuses_what_was_resolved_for_the_original(input_ids, sets, copied):
    model = named_model()
    model.set_active_experts(["public", "math"])
    selection, ids = model.select_experts(sets), input_ids[:2]
    want = model(ids, active_experts=selection).logits
    twin = copied(model)
    poison(model, NAMES)

    assert twin.model.identity != model.model.identity
    for call in (twin, twin.generate):
        with pytest.raises(ExpertsChangedError):
            call(ids, active_experts=selection)
    assert torch.equal(twin(ids, active_experts=sets).logits, want)
    # A copy of a copy, and both at once.
    assert torch.equal(copied((twin, model))[0](ids, active_experts=sets).logits, want)
    compiled = torch.compile(copied(twin), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False, active_experts=sets).logits, want, atol=1e-5, rtol=1e-5)
    with pytest.raises(ExpertsChangedError):
        model(ids, active_experts=twin.select_experts(sets))


@pytest.mark.parametrize("sets", [["public", "math"], [["public"], ["public", "math"]]], ids=["one", "rows"])
def test_a_set_that_was_resolved_in_inference_mode_serves_a_training_step(input_ids, sets):
    model, ids = named_model(), input_ids[:2]
    with torch.inference_mode():
        model(ids, active_experts=sets)
        selection = model.select_experts(sets)
    for given in (sets, selection):
        model(ids, labels=ids, active_experts=given).loss.backward()


@torch.no_grad()
def test_copied_layers_take_the_place_of_the_former_ones(input_ids):
    # As libraries do that repeat or prune layers; the copies bring their own selection along.
    model = named_model()
    model.set_active_experts(["public", "math"])
    want = model(input_ids).logits
    model.model.layers = copy.deepcopy(model.model.layers)

    assert torch.equal(model(input_ids).logits, want)


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@torch.no_grad()
def test_rows_of_different_sets_continue_from_a_cache(kind):
    model, ids = named_model(), torch.randint(2, TINY["vocab_size"], (3, 9))
    cache = DynamicCache() if kind is DynamicCache else StaticCache(config=model.config, max_cache_len=16)
    model(ids[:, :6], past_key_values=cache, active_experts=SETS)
    continued = model(ids[:, 6:], past_key_values=cache, active_experts=SETS).logits

    torch.testing.assert_close(continued, model(ids, active_experts=SETS).logits[:, 6:], atol=1e-5, rtol=1e-5)


def calls_of(model, name):
    """Count how often an expert's modules are called."""
    calls = []
    for expert in model.expert_modules(name):
        expert.register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_an_early_exit_drafts_with_the_set_of_the_call():
    model, ids = named_model(), torch.randint(2, TINY["vocab_size"], (1, 9))
    calls = calls_of(model, "math")
    model.generate(ids, active_experts=["public"], assistant_early_exit=1, max_new_tokens=6, do_sample=False)
    assert not calls


def test_an_assistant_with_an_adapter_drafts_with_the_set_of_the_call():
    peft = pytest.importorskip("peft")
    model, ids = named_model(), torch.randint(2, TINY["vocab_size"], (1, 9))
    helper = copy.deepcopy(model)
    calls = calls_of(helper, "math")
    helper = peft.get_peft_model(helper, peft.LoraConfig(target_modules=["q_proj"]))
    model.generate(ids, active_experts=["public"], assistant_model=helper, max_new_tokens=6, do_sample=False)
    assert not calls


def test_a_selection_for_other_rows_is_refused(input_ids):
    model = named_model()
    selection = model.select_experts([["public"], ["math"]])
    with pytest.raises(ExpertRowsError, match="2 sets of experts for 3 rows"):
        model(input_ids, active_experts=selection)


def test_a_module_that_takes_the_place_of_an_expert_is_the_one_that_is_computed(input_ids):
    model = named_model()
    model.set_active_experts(["public", "math"])
    before = model(input_ids).logits
    calls = []

    class Wrapped(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            calls.append(1)
            return self.inner(hidden)

    for mixture in model.mixtures:
        mixture.experts["1"] = Wrapped(mixture.experts["1"])
    torch.testing.assert_close(model(input_ids).logits, before)
    torch.testing.assert_close(model(input_ids, active_experts=["public", "math"]).logits, before)
    assert len(calls) == 4


def test_a_misspelt_keyword_is_answered_with_the_right_one(input_ids):
    with pytest.raises(TypeError, match="Did you mean 'active_experts'"):
        named_model()(input_ids, active_expert=["public"])
