"""Quantised experts: chosen, left out and saved like others, with a router that keeps its precision."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from flexolmo_hf.errors import ConfigurationError
from tests.modeling.test_expert_sets import NAMES, named_model, poison
from tests.peers import run_section

SETS = pytest.mark.parametrize("names", [NAMES, ["public", "code"], ["news"]], ids="+".join)
FILE_OF_MATH = "model-expert-math-00001-of-00001.safetensors"
EVERY_PATH = pytest.mark.parametrize("per_token", [4, 2], ids=["all of 4", "2 of 4"])


@pytest.fixture
def int8():
    """Make settings for torchao's 8-bit weights."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return lambda: TorchAoConfig(Int8WeightOnlyConfig())


def load(folder, names, settings):
    return AutoModelForCausalLM.from_pretrained(folder, active_experts=names, quantization_config=settings)


@SETS
@torch.no_grad()
def test_eight_bits_stay_close_to_full_precision(tmp_path, input_ids, int8, names):
    model = named_model()
    model.save_pretrained(tmp_path)
    model.set_active_experts(names)
    exact = model(input_ids).logits
    rounded = load(tmp_path, names, int8())(input_ids).logits

    # A weight is rounded to 1/127 of its row's largest: an error of about 0.6 % for 64 normal weights, and of about 2 %
    # after the matrices of two layers. Another expert's router row in place of the right one makes 40 %.
    error = (rounded - exact).pow(2).mean().sqrt() / exact.std()
    assert 0 < error < 0.05


@SETS
@torch.no_grad()
def test_every_matrix_but_the_router_and_the_head_is_quantised(tmp_path, int8, names):
    named_model(router_bias=True).save_pretrained(tmp_path)
    model = load(tmp_path, names, int8())
    plain = {name for name, module in model.named_modules() if type(getattr(module, "weight", None)) is nn.Parameter}
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    assert plain & linear == {"lm_head"}
    assert {f"model.layers.{layer}.mlp.gate" for layer in range(2)} <= plain
    for mixture in model.mixtures:
        assert mixture.gate.weight.dtype == mixture.gate.bias.dtype == torch.float32
        assert mixture.gate.weight.shape[0] == len(names)


@EVERY_PATH
@SETS
@torch.no_grad()
def test_left_out_at_load_and_switched_off_are_the_same_bit_for_bit(tmp_path, input_ids, int8, names, per_token):
    named_model(per_token).save_pretrained(tmp_path)
    part, everyone = load(tmp_path, names, int8()), load(tmp_path, NAMES, int8())
    with everyone.use_experts(*names):
        live = everyone(input_ids).logits
        generated = everyone.generate(input_ids, max_new_tokens=4, do_sample=False)

    assert torch.equal(part(input_ids).logits, live)
    assert torch.equal(part.generate(input_ids, max_new_tokens=4, do_sample=False), generated)


@EVERY_PATH
@torch.no_grad()
def test_an_expert_that_is_left_out_may_hold_nan(tmp_path, input_ids, int8, per_token):
    model = named_model(per_token)
    model.save_pretrained(tmp_path / "sound")
    poison(model, ["math", "news"])
    model.save_pretrained(tmp_path / "poisoned")
    expected = load(tmp_path / "sound", ["public", "code"], int8())(input_ids).logits
    everyone = load(tmp_path / "poisoned", NAMES, int8())
    with everyone.use_experts("public", "code"):
        live = everyone(input_ids).logits

    assert torch.equal(load(tmp_path / "poisoned", ["public", "code"], int8())(input_ids).logits, expected)
    assert torch.equal(live, expected)
    assert everyone(input_ids).logits.isnan().any()


@pytest.mark.parametrize("spoil", [lambda f: f.write_bytes(b"garbage"), lambda f: f.unlink()], ids=["garbage", "gone"])
@torch.no_grad()
def test_the_file_of_an_expert_that_is_left_out_is_not_opened(tmp_path, input_ids, int8, spoil):
    # The quantiser looks at the header of every file it is shown.
    named_model().save_pretrained(tmp_path)
    expected = load(tmp_path, ["public", "code"], int8())(input_ids).logits
    spoil(tmp_path / FILE_OF_MATH)

    assert torch.equal(load(tmp_path, ["public", "code"], int8())(input_ids).logits, expected)


@SETS
@torch.no_grad()
def test_a_quantised_model_is_saved_with_the_experts_it_has(tmp_path, input_ids, int8, names):
    named_model().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", names, int8())
    expected = model(input_ids).logits
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")

    assert again.expert_names == names
    assert torch.equal(again(input_ids).logits, expected)
    assert torch.equal(model(input_ids).logits, expected)


@torch.no_grad()
def test_a_quantised_checkpoint_is_loaded_in_part(tmp_path, input_ids, int8):
    named_model().save_pretrained(tmp_path / "model")
    model = load(tmp_path / "model", NAMES, int8())
    model.save_pretrained(tmp_path / "saved")
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", active_experts=["public", "news"])
    with model.use_experts("public", "news"):
        assert torch.equal(part(input_ids).logits, model(input_ids).logits)


def test_an_adapter_trains_beside_quantised_experts(tmp_path, input_ids, int8):
    peft = pytest.importorskip("peft")
    from flexolmo_hf.modeling.adapters import expert_targets

    named_model().save_pretrained(tmp_path)
    base = load(tmp_path, ["public", "math"], int8())
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=expert_targets(base, "math")))
    model(input_ids=input_ids, labels=input_ids).loss.backward()

    graded = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(graded) == 2 * 2 * 3
    assert all(".mlp.experts.1." in name and ".lora_" in name for name in graded)


@torch.no_grad()
def test_the_page_shows_what_runs(tmp_path, monkeypatch, input_ids, int8):
    monkeypatch.chdir(tmp_path)
    named_model().save_pretrained("MERGED")
    model = run_section("Fewer bits", input_ids=input_ids)["model"]

    assert type(model.mixtures[0].experts["0"].up_proj.weight) is not nn.Parameter


@pytest.mark.gpu
@SETS
@torch.no_grad()
def test_bitsandbytes_quantises_the_experts_and_not_the_router(tmp_path, input_ids, names):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from transformers import BitsAndBytesConfig

    named_model().save_pretrained(tmp_path)
    exact = AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=names, device_map="cuda")
    settings = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, active_experts=names, quantization_config=settings, device_map="cuda"
    )
    for module in model.expert_modules(names[0]):
        assert isinstance(module.up_proj, bitsandbytes.nn.Linear8bitLt)
    assert all(mixture.gate.weight.is_floating_point() for mixture in model.mixtures)
    expected, rounded = exact(input_ids.cuda()).logits.float(), model(input_ids.cuda()).logits.float()
    assert (rounded - expected).pow(2).mean().sqrt() / expected.std() < 0.15


def test_no_expert_is_loaded_into_a_quantised_model(tmp_path, int8):
    named_model().save_pretrained(tmp_path)
    model = load(tmp_path, ["public", "math"], int8())
    with pytest.raises(ConfigurationError, match="quantised"):
        model.load_expert("news")
    assert model.expert_names == ["public", "math"]
