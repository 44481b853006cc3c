"""The network computes what upstream's does, in every way it is run."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel

from flexolmo_hf import FlexOlmoConfig, FlexOlmoForCausalLM
from flexolmo_hf.errors import UnknownArgumentError
from tests.conftest import TINY, stock_model

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGURATIONS = {
    "all-experts": {},
    "top-1-of-4": {"num_experts_per_tok": 1},
    "top-2-of-4": {"num_experts_per_tok": 2},
    "top-3-normalised": {"num_experts_per_tok": 3, "norm_topk_prob": True},
    "one-expert": {"num_experts": 1, "num_experts_per_tok": 1},
    "gqa": {"num_key_value_heads": 1},
    "attention-bias": {"attention_bias": True},
    "tied-embeddings": {"tie_word_embeddings": True, "num_experts_per_tok": 2},
    "rope-scaling": {"rope_parameters": LLAMA3_ROPE},
}


@pytest.fixture(params=CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def stock(request):
    return stock_model(**request.param)


def nothing_is_amiss(report):
    return not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


@torch.no_grad()
def test_a_stock_checkpoint_gives_the_same_logits_here(stock, tmp_path, input_ids):
    stock.save_pretrained(tmp_path)
    ours, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)

    assert type(ours) is FlexOlmoForCausalLM
    assert nothing_is_amiss(report)
    torch.testing.assert_close(ours(input_ids).logits, stock(input_ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_a_checkpoint_of_ours_gives_the_same_logits_in_stock(stock, tmp_path, input_ids):
    stock.save_pretrained(tmp_path / "theirs")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    back, report = StockModel.from_pretrained(tmp_path / "ours", output_loading_info=True)

    assert nothing_is_amiss(report)
    torch.testing.assert_close(back(input_ids).logits, ours(input_ids).logits, atol=1e-5, rtol=0)


@pytest.fixture
def pair(tmp_path, request):
    """A stock model and ours with the same weights."""
    stock = stock_model(**getattr(request, "param", {}))
    stock.save_pretrained(tmp_path / "checkpoint")
    return stock, AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")


@pytest.mark.parametrize("pair", [{}, {"num_experts_per_tok": 2}], indirect=True, ids=["dense path", "top-k path"])
def test_loss_router_logits_and_gradients_equal_stock(pair, input_ids):
    for model in pair:
        model(input_ids, labels=input_ids, output_router_logits=True).loss.backward()
    stock, ours = (model(input_ids, labels=input_ids, output_router_logits=True) for model in pair)

    torch.testing.assert_close(ours.loss, stock.loss)
    torch.testing.assert_close(ours.aux_loss, stock.aux_loss)
    for layer_ours, layer_stock in zip(ours.router_logits, stock.router_logits, strict=True):
        torch.testing.assert_close(layer_ours, layer_stock, atol=1e-5, rtol=0)
    mixture, block = pair[1].model.layers[0].mlp, pair[0].model.layers[0].mlp
    torch.testing.assert_close(mixture.gate.weight.grad, block.gate.weight.grad, atol=1e-5, rtol=1e-4)
    for index, expert in mixture.experts.items():
        gate_up = torch.cat([expert.gate_proj.weight.grad, expert.up_proj.weight.grad])
        torch.testing.assert_close(gate_up, block.experts.gate_up_proj.grad[int(index)], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_and_attentions_equal_stock(pair, input_ids):
    for model in pair:
        model.set_attn_implementation("eager")
    stock, ours = (model(input_ids, output_hidden_states=True, output_attentions=True) for model in pair)

    assert len(ours.hidden_states) == TINY["num_hidden_layers"] + 1
    assert len(ours.attentions) == TINY["num_hidden_layers"]
    for mine, theirs in zip(ours.hidden_states + ours.attentions, stock.hidden_states + stock.attentions, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention"])
def test_attention_implementations_agree(pair, input_ids, attention):
    stock, ours = pair
    expected = stock(input_ids).logits
    ours.set_attn_implementation(attention)

    torch.testing.assert_close(ours(input_ids).logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pair", [{}, {"num_experts_per_tok": 2}], indirect=True, ids=["dense path", "top-k path"])
def test_low_precision_stays_as_close_to_full_precision_as_stock_does(pair, input_ids, dtype):
    stock, ours = pair
    exact = stock(input_ids).logits
    error_ours = (ours.to(dtype)(input_ids).logits - exact).abs().mean()
    error_stock = (stock.to(dtype)(input_ids).logits - exact).abs().mean()

    assert ours(input_ids).logits.dtype == dtype
    assert error_ours <= 1.2 * error_stock


@pytest.mark.parametrize("pair", [{}, {"num_experts_per_tok": 2}], indirect=True, ids=["dense path", "top-k path"])
def test_gradient_checkpointing_changes_no_gradient(pair, input_ids):
    _, ours = pair
    ours.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            ours.gradient_checkpointing_enable()
        ours.zero_grad()
        ours(input_ids, labels=input_ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in ours.parameters() if p.grad is not None])

    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


@torch.no_grad()
def test_left_padding_changes_no_row(pair, input_ids):
    _, ours = pair
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), input_ids], dim=1)
    mask = torch.cat([torch.zeros(3, 4, dtype=torch.long), torch.ones_like(input_ids)], dim=1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)

    logits = ours(padded, attention_mask=mask, position_ids=position_ids).logits[:, 4:]
    torch.testing.assert_close(logits, ours(input_ids).logits, atol=1e-4, rtol=1e-4)


GENERATION = {
    "greedy": {"do_sample": False},
    "static cache": {"do_sample": False, "cache_implementation": "static"},
    "beam search": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 20},
    "prompt lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
}


@pytest.mark.parametrize("options", GENERATION.values(), ids=GENERATION.keys())
@pytest.mark.parametrize("pair", [{}, {"num_experts_per_tok": 2}], indirect=True, ids=["dense path", "top-k path"])
def test_generation_equals_stock(pair, input_ids, options):
    prompt = input_ids[:1] if "prompt_lookup_num_tokens" in options else input_ids
    outputs = []
    for model in pair:
        torch.manual_seed(0)
        # transformers compiles a static cache's forward on its own where it can; here it would only cost time.
        outputs.append(model.generate(prompt, max_new_tokens=8, disable_compile=True, **options))

    assert torch.equal(outputs[0], outputs[1])


@torch.no_grad()
def test_a_device_map_places_the_model(pair, tmp_path, input_ids):
    stock, _ = pair
    mapped = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", device_map="auto")

    torch.testing.assert_close(mapped(input_ids).logits, stock(input_ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_disk_offload_computes_the_same(pair, tmp_path, input_ids):
    stock, _ = pair
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    mapped = AutoModelForCausalLM.from_pretrained(
        tmp_path / "checkpoint", device_map=places, offload_folder=tmp_path / "offload"
    )

    torch.testing.assert_close(mapped(input_ids).logits, stock(input_ids).logits, atol=1e-5, rtol=0)


def test_the_whole_forward_compiles_as_one_graph_on_the_dense_path(pair, input_ids):
    _, ours = pair
    with torch.no_grad():
        expected = ours(input_ids, use_cache=False).logits
        compiled = torch.compile(ours, fullgraph=True, backend="eager")(input_ids, use_cache=False).logits

    torch.testing.assert_close(compiled, expected)


def test_a_model_can_be_built_from_its_configuration_alone(input_ids):
    config = FlexOlmoConfig(**TINY, num_experts=2, expert_names=["public", "math"])
    model = AutoModelForCausalLM.from_config(config)

    assert type(model) is FlexOlmoForCausalLM
    assert model(input_ids).logits.isfinite().all()
    assert model.model.layers[0].mlp.gate.weight.std() > 0


@pytest.mark.parametrize("call", ["forward", "generate", "backbone"])
def test_an_unknown_keyword_is_refused_and_not_swallowed(pair, input_ids, call):
    _, ours = pair
    functions = {"forward": ours, "generate": ours.generate, "backbone": ours.model}

    with pytest.raises(ValueError, match="active_expert"):
        functions[call](input_ids, active_expert=["public"])


def test_an_unknown_keyword_for_loading_is_refused_with_the_closest_known_one(pair, tmp_path):
    with pytest.raises(UnknownArgumentError, match="Did you mean 'active_experts'"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint", active_expert=["public"])


@pytest.mark.gpu
@torch.no_grad()
def test_the_gpu_computes_what_the_cpu_does(pair, input_ids):
    _, ours = pair
    expected = ours(input_ids).logits
    on_device = ours.to("cuda")(input_ids.to("cuda")).logits.cpu()

    torch.testing.assert_close(on_device, expected, atol=1e-3, rtol=1e-3)
