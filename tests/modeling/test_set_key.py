"""A key names what a set computes: the same wherever it is computed, another for anything that computes otherwise."""

import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from flexolmo_hf.errors import ConfigurationError, UnknownExpertError
from tests.modeling.test_expert_sets import COPIES, NAMES, named_model, poison

SET = ["public", "math"]


def test_a_key_is_short_and_safe_to_put_anywhere():
    assert re.fullmatch("[0-9a-f]{32}", named_model().expert_set_key(SET))


def test_a_key_depends_on_the_set_and_not_on_how_it_is_written():
    model = named_model()
    keys = {tuple(names): model.expert_set_key(names) for names in ([n] for n in NAMES)}

    assert len({*keys.values(), model.expert_set_key(), model.expert_set_key(SET)}) == 6
    assert model.expert_set_key(["math", "public"]) == model.expert_set_key("public+math") == model.expert_set_key(SET)
    with model.use_experts(*SET):
        assert model.expert_set_key() == model.expert_set_key(SET)


def test_a_key_is_the_same_for_whoever_loads_the_same_weights(tmp_path):
    model = named_model(2, router_bias=True)
    key = model.expert_set_key(SET)
    model.save_pretrained(tmp_path)
    script = f"""
from flexolmo_hf import FlexOlmoForCausalLM
model = FlexOlmoForCausalLM.from_pretrained({str(tmp_path)!r}, active_experts=["public", "math", "news"])
print(model.expert_set_key({SET}))"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert AutoModelForCausalLM.from_pretrained(tmp_path, active_experts=SET).expert_set_key() == key
    assert done.stdout.split()[-1] == key


def test_each_row_has_its_key():
    model = named_model()
    assert model.expert_set_key([SET, ["news"], None]) == [
        model.expert_set_key(SET),
        model.expert_set_key(["news"]),
        model.expert_set_key(),
    ]
    assert model.expert_set_key([SET]) == [model.expert_set_key(SET)]


def change(parameter):
    with torch.no_grad():
        parameter.view(-1)[0] -= 1


@pytest.mark.parametrize(
    "part",
    [
        lambda m: m.model.norm.weight,
        lambda m: m.lm_head.weight,
        lambda m: m.expert_modules("math")[1].down_proj.weight,
        lambda m: m.mixtures[1].gate.weight,
        lambda m: m.mixtures[0].gate.bias,
    ],
    ids=["norm", "head", "matrix", "row", "bias"],
)
def test_a_key_changes_with_any_weight_of_the_set(part):
    model = named_model(router_bias=True)
    before = model.expert_set_key(SET)
    change(part(model))
    assert model.expert_set_key(SET) != before


def test_a_key_does_not_depend_on_experts_outside_the_set():
    model = named_model()
    before = model.expert_set_key(SET)
    poison(model, ["code", "news"])
    assert model.expert_set_key(SET, refresh=True) == before


def test_a_key_changes_with_the_experts_per_token_only_where_they_matter():
    model, keys = named_model(), []
    for per_token in (1, 2, 4):
        model.config.num_experts_per_tok = per_token
        keys.append(model.expert_set_key(SET))
    assert keys[0] != keys[1] == keys[2]


def test_weights_that_were_written_behind_torchs_back_need_a_refresh():
    model = named_model()
    before = model.expert_set_key(SET)
    model.lm_head.weight.data.view(-1)[1] += 1
    assert model.expert_set_key(SET, refresh=True) != before


def test_a_merged_adapter_changes_the_key_and_an_unmerged_one_has_none():
    peft = pytest.importorskip("peft")
    model = named_model()
    before = model.expert_set_key(SET)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ConfigurationError, match="adapters"):
        adapted.expert_set_key(SET)
    assert adapted.merge_and_unload().expert_set_key(SET) != before


def test_only_what_changed_is_read_again(monkeypatch):
    model = named_model()
    key = model.expert_set_key()
    read = []
    original = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: read.append(self.numel()) or original(self))
    assert model.expert_set_key() == key
    # Rows, and samples of the rest: no tensor is read whole.
    assert max(read) <= 4 * 260
    change(model.lm_head.weight)
    read.clear()
    model.expert_set_key()
    assert max(read) == model.lm_head.weight.numel() * 4


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_reads_its_own_weights(monkeypatch, copied):
    # Both come from a copy, so that the counters of their tensors are equal too.
    model = copied(named_model())
    key, twin = model.expert_set_key(), copied(model)
    for own, other in zip(twin.parameters(), model.parameters(), strict=True):
        own.data = other.data
    read = []
    original = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: read.append(self.numel()) or original(self))
    assert twin.expert_set_key() == key
    assert max(read) == model.lm_head.weight.numel() * 4


def test_a_key_of_another_precision_is_another():
    model = named_model()
    before = model.expert_set_key()
    assert model.to(torch.bfloat16).expert_set_key() != before
    assert named_model().expert_set_key() != before


def test_a_key_of_an_unknown_set_is_refused():
    with pytest.raises(UnknownExpertError):
        named_model().expert_set_key(["poems"])


def test_the_key_of_a_low_rank_expert_depends_on_the_public_matrices_it_adds_to():
    model = named_model(expert_forms={"math": {"rank": 3}})
    before = model.expert_set_key(["math"]), model.expert_set_key(["code"])
    change(model.expert_modules("public")[0].up_proj.weight)
    assert model.expert_set_key(["math"]) != before[0]
    assert model.expert_set_key(["code"]) == before[1]


def test_a_key_does_not_depend_on_the_form_of_other_experts():
    plain = named_model()
    other = named_model(expert_forms={"news": {"width": 16}})
    other.load_state_dict(plain.state_dict() | {k: v for k, v in other.state_dict().items() if ".experts.3." in k})
    assert other.expert_set_key(["code"]) == plain.expert_set_key(["code"])
