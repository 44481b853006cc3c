"""However the experts are run, they compute the same; packing them changes where their memory lies and nothing else."""

import copy
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError
from tests.conftest import stock_model
from tests.modeling.test_expert_sets import named_model, poison

WAYS = ["dense", "eager", "grouped_mm", "batched_mm"]
PER_TOKEN = pytest.mark.parametrize("per_token", [4, 2, 1], ids=["all of 4", "2 of 4", "1 of 4"])
CHOSEN = [None, ["public", "math", "news"], [["public"], ["code", "math", "news"], ["math"]]]
SETS = pytest.mark.parametrize("sets", CHOSEN, ids=["all", "set", "rows"])
TOKENS = pytest.mark.parametrize("tokens", [1, 11])


@SETS
@PER_TOKEN
@TOKENS
@pytest.mark.parametrize("normed", [False, True], ids=["", "norm_topk_prob"])
@torch.no_grad()
def test_all_ways_agree(input_ids, sets, per_token, tokens, normed):
    model = named_model(per_token, norm_topk_prob=normed)
    ids = input_ids[:, :tokens]
    want = model(ids, active_experts=sets).logits
    for way in WAYS:
        model.set_experts_implementation(way)
        torch.testing.assert_close(model(ids, active_experts=sets).logits, want, atol=1e-5, rtol=1e-5, msg=way)


@SETS
@PER_TOKEN
@pytest.mark.parametrize("way", ["auto", *WAYS])
@torch.no_grad()
def test_all_ways_are_right_in_bfloat16(input_ids, sets, per_token, way):
    model = named_model(per_token)
    want = model(input_ids, active_experts=sets).logits
    model.set_experts_implementation(way)
    found = model.to(torch.bfloat16)(input_ids, active_experts=sets).logits

    assert found.dtype == torch.bfloat16
    # A token near a tie may choose otherwise after rounding; the rest must stay within bfloat16's 8 bits.
    error = (found.float() - want).norm(dim=-1) / want.norm(dim=-1)
    assert error.median() < 0.03


@PER_TOKEN
@torch.no_grad()
def test_every_way_agrees_with_stock(input_ids, tmp_path, per_token):
    stock = stock_model(num_experts_per_tok=per_token)
    stock.save_pretrained(tmp_path)
    want = stock(input_ids).logits
    for way in ["auto", *WAYS]:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=way)
        assert model.config._experts_implementation == way
        torch.testing.assert_close(model(input_ids).logits, want, atol=1e-5, rtol=1e-5, msg=way)


@pytest.mark.parametrize("way", ["grouped", "flash", "", 3])
def test_a_way_that_does_not_exist_is_refused(way, tmp_path):
    model = named_model()
    with pytest.raises(ConfigurationError, match="'auto'|auto"):
        model.set_experts_implementation(way)
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigurationError):
        AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=way)


def storages(model):
    """Return the memory of the experts' weights, each once."""
    weights = [p for mixture in model.mixtures for p in mixture.experts.parameters()]
    return {w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}


def test_packed_experts_are_the_linear_weights_themselves(input_ids):
    model = named_model(2)
    model.set_experts_implementation("grouped_mm")
    before, parameters = model(input_ids).logits, dict(model.named_parameters())
    model.pack_experts()

    assert len(storages(model)) == 2 * 2
    assert sum(storages(model).values()) == sum(p.numel() * 4 for m in model.mixtures for p in m.experts.parameters())
    assert all(after is parameters[name] for name, after in model.named_parameters())
    assert torch.equal(model(input_ids).logits, before)
    with torch.no_grad():
        model.expert_modules("math")[0].up_proj.weight.add_(1)
    assert not torch.allclose(model(input_ids).logits, before)


def test_an_inactive_packed_expert_is_never_computed(input_ids):
    model = named_model(2)
    model.set_experts_implementation("grouped_mm")
    with torch.no_grad(), model.use_experts("public", "math", "code"):
        before = model(input_ids).logits
        poison(model, ["news"])
        assert torch.equal(model(input_ids).logits, before)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.bfloat16().float(),
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}) and model,
        lambda model: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True) and model,
    ],
    ids=["to", "half and back", "deepcopy", "pickle", "load_state_dict", "load_state_dict assign"],
)
@torch.no_grad()
def test_packed_experts_follow_their_weights(input_ids, change):
    model = named_model(2)
    model.set_experts_implementation("grouped_mm")
    model.pack_experts()
    changed = change(model)
    found = changed(input_ids).logits
    changed.set_experts_implementation("eager")

    torch.testing.assert_close(found, changed(input_ids).logits, atol=1e-5, rtol=1e-5)
    assert len(storages(changed)) == 2 * 2


def test_packed_experts_train_as_others_do(input_ids):
    packed, plain = named_model(2), None
    plain = copy.deepcopy(packed)
    packed.set_experts_implementation("grouped_mm")
    packed.pack_experts()
    for model in (packed, plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(2):
            model(input_ids, labels=input_ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, one), two in zip(packed.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(packed(input_ids).logits, plain(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_a_router_learns_through_frozen_packed_experts(input_ids):
    model = named_model(2)
    for mixture in model.mixtures:
        mixture.experts.requires_grad_(False)
    grads = []
    for way in ("eager", "grouped_mm"):
        model.set_experts_implementation(way)
        model.zero_grad()
        model(input_ids, labels=input_ids).loss.backward()
        grads.append([mixture.gate.weight.grad.clone() for mixture in model.mixtures])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_a_packed_model_saves_and_loads_as_others_do(input_ids, tmp_path):
    model = named_model(2)
    before = model(input_ids).logits
    model.pack_experts()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=["public", "code"])
    with model.use_experts("public", "code"):
        assert torch.equal(loaded(input_ids).logits, model(input_ids).logits)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids).logits, before)
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < weights * 1.05


def test_experts_that_are_not_plain_weights_are_not_packed():
    model = named_model(2)
    model.expert_modules("math")[1].up_proj = torch.nn.Sequential(model.expert_modules("math")[1].up_proj)
    with pytest.raises(ConfigurationError, match="cannot be packed"):
        model.pack_experts()


@torch.no_grad()
def test_compiling_experts_that_are_not_packed_runs_all_of_them(input_ids):
    model = named_model(2)
    want = model(input_ids).logits
    model.set_experts_implementation("grouped_mm")
    found = torch.compile(model, backend="eager", fullgraph=True)(input_ids, use_cache=False).logits
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_weights_that_no_kernel_takes_run_one_by_one(input_ids):
    model = named_model(2).double()
    want = model(input_ids).logits
    model.set_experts_implementation("grouped_mm")
    assert torch.equal(model(input_ids).logits, want)


@torch.no_grad()
def test_decoding_one_token_on_a_cpu_neither_sorts_nor_scatters(input_ids):
    model = named_model(2)
    with torch.profiler.profile() as profile:
        model.model.layers[0].mlp(torch.randn(1, 1, 64))
    seen = {event.key for event in profile.key_averages()}

    costly = ("where", "sort", "index_add_", "scatter_", "nonzero", "bincount")
    assert not seen & {f"aten::{name}" for name in costly}


@PER_TOKEN
def test_the_real_size_has_the_published_number_of_parameters_and_its_shapes_fit(per_token):
    """7x7B on no memory: shapes, dtypes and bytes of a forward as it will be on a device."""
    config = FlexOlmoConfig(
        vocab_size=100352,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_experts=7,
        num_experts_per_tok=7 if per_token == 4 else per_token,
        max_position_embeddings=4096,
        dtype=torch.bfloat16,
    )
    with torch.device("meta"):
        model = FlexOlmoForCausalLM._from_config(config)
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers == 33_270_665_216
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(p.nbytes for p in model.parameters()) == 2 * numbers
    one_expert = sum(p.nbytes for module in model.expert_modules("expert_3") for p in module.parameters())
    assert one_expert == 2 * 32 * 3 * 4096 * 11008
    for way in ("dense", "grouped_mm"):
        model.set_experts_implementation(way)
        if way == "grouped_mm":
            model.pack_experts()
            # No second copy: the 3-D tensors are all the memory the experts have.
            assert sum(p.numel() for p in model.parameters()) == numbers
            packed = [mixture.packed for mixture in model.mixtures]
            assert sum(p.gate_up_proj.nbytes + p.down_proj.nbytes for p in packed) == 7 * one_expert
        with torch.no_grad():
            out = model(torch.zeros(2, 16, dtype=torch.long, device="meta"), output_router_logits=True)
        assert (out.logits.shape, out.logits.dtype) == ((2, 16, 100352), torch.bfloat16)
        assert [tuple(logits.shape) for logits in out.router_logits] == [(32, 7)] * 32


@pytest.mark.parametrize("way", ["dense", "grouped_mm"])
@torch.no_grad()
def test_fake_tensors_pass_through_every_path_a_device_would_take(way):
    with FakeTensorMode() as mode:
        # In bfloat16: that is all torch knows the shapes of grouped products for.
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = named_model(2)
        finally:
            torch.set_default_dtype(torch.float32)
        model.set_experts_implementation(way)
        if way == "grouped_mm":
            model.pack_experts()
        ids = mode.from_tensor(torch.zeros(3, 5, dtype=torch.long))
        for sets in (None, ["public", "math", "code"], [["public"], ["math"], ["public", "code"]]):
            assert model(ids, active_experts=sets, use_cache=False).logits.shape == (3, 5, 97)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_gpu_packs_by_itself_and_agrees_with_the_cpu(input_ids, dtype):
    model = named_model(2)
    want = [model(input_ids, active_experts=sets).logits for sets in CHOSEN]
    model.to("cuda", dtype)
    for sets, logits in zip(CHOSEN, want, strict=True):
        found = model(input_ids.to("cuda"), active_experts=sets).logits.float().cpu()
        if dtype == torch.float32:
            torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
        else:
            assert ((found - logits).norm(dim=-1) / logits.norm(dim=-1)).median() < 0.03
    assert all(mixture.packed is not None for mixture in model.mixtures)


@torch.no_grad()
def test_a_compiled_forward_never_uses_packed_experts_that_are_out_of_date(input_ids):
    model = named_model(1)
    model.set_experts_implementation("grouped_mm")
    model.pack_experts()
    model.load_state_dict({k: v * (2 if ".experts." in k else 1) for k, v in model.state_dict().items()}, assign=True)
    found = torch.compile(model, backend="eager")(input_ids, use_cache=False).logits
    torch.testing.assert_close(found, model(input_ids).logits, atol=1e-4, rtol=1e-4)


def test_an_adapter_added_to_packed_experts_is_not_passed_over(input_ids):
    peft = pytest.importorskip("peft")
    model = named_model(1)
    model.set_experts_implementation("grouped_mm")
    model.pack_experts()
    config = peft.LoraConfig(target_modules=r".*experts\.1\.up_proj", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        want = adapted(input_ids=input_ids, use_cache=False).logits
        found = torch.compile(adapted, backend="eager")(input_ids=input_ids, use_cache=False).logits
    torch.testing.assert_close(found, want, atol=1e-4, rtol=1e-4)


def test_experts_packed_in_inference_mode_can_still_be_trained(input_ids):
    model = named_model(2)
    model.set_experts_implementation("grouped_mm")
    with torch.inference_mode():
        model(input_ids)
    model(input_ids, labels=input_ids).loss.backward()
    assert model.expert_modules("public")[0].up_proj.weight.grad is not None


@pytest.mark.parametrize("move", [copy.deepcopy, lambda model: model.to(torch.bfloat16)], ids=["copied", "moved"])
@torch.no_grad()
def test_a_compiled_forward_computes_the_experts_of_a_packed_model_that_was_moved_or_copied(input_ids, move):
    model = named_model(1)
    model.set_experts_implementation("grouped_mm")
    model.pack_experts()
    changed = move(model)
    for mixture in changed.mixtures:
        for parameter in mixture.experts.parameters():
            parameter.data.mul_(2)
    found = torch.compile(changed, backend="eager")(input_ids, use_cache=False).logits
    changed.set_experts_implementation("eager")
    torch.testing.assert_close(found, changed(input_ids).logits, atol=5e-2, rtol=5e-2)
