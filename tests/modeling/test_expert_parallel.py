"""Whole experts on two processes: the outputs of one, and nothing of an expert where it does not belong."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.distributed import DistributedConfig

from flexolmo_hf import FlexOlmoConfig
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_parallel import held_indices
from tests.conftest import TINY
from tests.modeling import expert_parallel_worker, parallel_worker
from tests.modeling.expert_parallel_worker import LIVE, THREE, bits_of, sampled
from tests.modeling.parallel_worker import inputs
from tests.modeling.test_expert_sets import NAMES, named_model
from tests.trainers.launching import launch

PER_TOKEN = (4, 2)
WAYS = ("dense", "eager", "grouped_mm")


def give_out(checkpoint, folder, names):
    """Copy a checkpoint for each process, with the files of what is shared and of its own experts, and no others."""
    for rank in range(2):
        own = [*names[rank::2], "shared"]
        weights = [file for name in own for file in checkpoint.glob(f"model-*{name}-0*.safetensors")]
        (folder / str(rank)).mkdir(parents=True)
        for file in [*weights, *checkpoint.glob("*.json")]:
            shutil.copy(file, folder / str(rank))


@pytest.fixture(scope="module")
def models():
    """The same models in one process, by experts per token."""
    torch.manual_seed(0)
    return {per_token: named_model(per_token, router_bias=True).eval() for per_token in PER_TOKEN}


@pytest.fixture(scope="module")
def spread(models, tmp_path_factory):
    """What two processes found, each from files of its own."""
    folder = tmp_path_factory.mktemp("spread")
    for per_token, model in models.items():
        checkpoint = folder / f"ALL{per_token}"
        model.save_pretrained(checkpoint)
        give_out(checkpoint, folder / f"MODEL{per_token}", NAMES)
        give_out(checkpoint, folder / f"THREE{per_token}", THREE)
        for rank in range(2):
            one = folder / f"ONE{per_token}" / str(rank)
            model.config.save_pretrained(one)
            save_file(model.state_dict(), one / "model.safetensors", metadata={"format": "pt"})
    launch(Path(expert_parallel_worker.__file__), folder)
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(2)]


@pytest.fixture(scope="module")
def alone(models):
    """What one process finds."""
    found = {}
    with torch.no_grad():
        for per_token, model in models.items():
            found |= {f"{per_token} {name}": tensor for name, tensor in parallel_worker.logits_of(model).items()}
            found[f"{per_token} live"] = model(inputs(), active_experts=LIVE).logits
            found[f"{per_token} sliced"] = found[f"{per_token} one file"] = found[f"{per_token} all"]
            found[f"{per_token} backbone"] = model.model(inputs()).last_hidden_state
            found |= {f"{per_token} {name}": found[f"{per_token} per row"] for name in WAYS}
            found[f"{per_token} three"] = model(inputs(), active_experts=THREE).logits
            found[f"{per_token} three generated"] = model.generate(
                inputs(), max_new_tokens=5, do_sample=False, active_experts=THREE
            )
            found[f"{per_token} bits"] = bits_of(model)
            torch.manual_seed(0)
            found[f"{per_token} sampled"] = sampled(model)
    return found


@pytest.mark.parametrize("per_token", PER_TOKEN)
@pytest.mark.parametrize(
    "name", [*parallel_worker.SETS, "per row", "live", "three", "sliced", "one file", "backbone", *WAYS]
)
def test_two_processes_with_whole_experts_compute_the_logits_of_one(spread, alone, name, per_token):
    for found in spread:
        torch.testing.assert_close(found[f"{per_token} {name}"], alone[f"{per_token} {name}"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("per_token", PER_TOKEN)
@pytest.mark.parametrize("name", ["generated", "three generated"])
def test_two_processes_with_whole_experts_generate_what_one_does(spread, alone, name, per_token):
    assert all(torch.equal(found[f"{per_token} {name}"], alone[f"{per_token} {name}"]) for found in spread)


@pytest.mark.parametrize("per_token", PER_TOKEN)
def test_processes_that_were_seeded_differently_draw_the_tokens_of_the_first(spread, alone, per_token):
    assert all(torch.equal(found[f"{per_token} sampled"], alone[f"{per_token} sampled"]) for found in spread)


@pytest.mark.parametrize("per_token", PER_TOKEN)
def test_the_opt_out_matrix_of_two_processes_is_that_of_one(spread, alone, per_token):
    for found in spread:
        torch.testing.assert_close(found[f"{per_token} bits"], alone[f"{per_token} bits"], atol=1e-4, rtol=0)


def test_a_process_holds_what_is_shared_and_its_own_experts(spread, models):
    expert = sum(parameter.nbytes for module in models[4].expert_modules("math") for parameter in module.parameters())
    everything = sum(parameter.nbytes for parameter in models[4].parameters())
    row = sum(mixture.gate.weight[0].nbytes + mixture.gate.bias[0].nbytes for mixture in models[4].mixtures)

    assert [int(found["bytes of four"]) for found in spread] == [everything - 2 * expert] * 2
    assert [int(found["bytes of three"]) for found in spread] == [everything - own * expert - row for own in (2, 3)]


def test_a_layer_takes_one_sum_however_many_experts_it_has(spread, models):
    assert [int(found["sums"]) for found in spread] == [len(models[4].mixtures)] * 2


@pytest.mark.parametrize("per_token", PER_TOKEN)
def test_an_expert_that_is_off_leaves_no_trace(spread, per_token):
    for found in spread:
        assert torch.equal(found[f"{per_token} two poisoned"], found[f"{per_token} two"])
        # Of these rows, the last one uses what is poisoned.
        assert torch.equal(found[f"{per_token} per row poisoned"][:2], found[f"{per_token} per row"][:2])
        assert found[f"{per_token} per row poisoned"][2].isnan().any()


def test_a_removed_expert_is_gone_on_every_process(spread, models):
    with torch.no_grad():
        without = models[2](inputs(), active_experts=THREE).logits
    for found in spread:
        torch.testing.assert_close(found["removed"], without, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "what",
    ["save", "train", "freeze", "learn", "learn one", "add", "new", "load", "package", "key", "pack", "fingerprint"],
)
def test_what_needs_every_expert_in_one_process_is_refused_by_both(spread, what):
    assert all(found.get(f"refused {what}") for found in spread)


@pytest.mark.parametrize("what", ["inputs", "masks", "sets"])
def test_processes_that_are_to_generate_from_different_inputs_all_refuse(spread, what):
    assert all(found.get(f"refused {what}") for found in spread)


@pytest.mark.parametrize("processes", [2, 3, 8])
def test_every_loaded_expert_is_on_one_process(monkeypatch, processes):
    config = FlexOlmoConfig(
        **TINY, num_experts=7, active_experts=["public", "expert_2", "expert_3", "expert_5", "expert_6"]
    )
    held = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        held += held_indices(config, {"tp_size": processes, "ep_size": processes})

    assert sorted(held) == config.loaded_indices


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"tp_size": 2, "ep_size": 4, "fsdp_size": 2}, "one batch"),
        ({"tp_size": 2, "ep_size": 2, "pp_size": 2}, "one batch"),
        ({"tp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}, "another way"),
        ({"tp_size": 2, "ep_size": 2, "ep_plan": {"layers.*.mlp": "grouped_gemm"}}, "another way"),
    ],
)
def test_other_ways_to_spread_experts_are_refused(sizes, words):
    with pytest.raises(ConfigurationError, match=words):
        held_indices(FlexOlmoConfig(**TINY), DistributedConfig(**sizes))


def test_low_rank_experts_are_not_spread():
    settings = {**TINY, "num_experts": 3, "expert_forms": {"expert_1": {"rank": 4}}}
    sizes = DistributedConfig(tp_size=2, ep_size=2)

    with pytest.raises(ConfigurationError, match="expert_1"):
        held_indices(FlexOlmoConfig(**settings), sizes)
    assert held_indices(FlexOlmoConfig(**settings, active_experts=["public", "expert_2"]), sizes) == [0]
