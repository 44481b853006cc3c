"""Training in two processes is training in one: data parallel and sharded, whole and by its parts."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, UnknownExpertError
from flexolmo_hf.trainers.resume import last_complete_checkpoint
from flexolmo_hf.trainers.sharded import expert_state, load_expert_state
from tests.conftest import byte_tokenizer, dense_model
from tests.trainers import ddp_worker, fsdp_trainer_worker, fsdp_worker
from tests.trainers.launching import launch
from tests.trainers.test_freezing import belongs_to

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `START`, a model with the expert math and biases that are in use."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    dense = dense_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_bias=True)
    for mixture in model.mixtures:
        mixture.gate.bias.data[1] = -0.3
    model.save_pretrained(folder / "START")
    tokenizer.save_pretrained(folder / "START")
    return folder


@pytest.fixture(scope="module")
def ddp(place):
    """The folder, with every run of `ddp_worker` made in two processes and in one."""
    launch(HERE / "ddp_worker.py", place)
    for name in ddp_worker.RUNS:
        ddp_worker.train(place, name, 1)
    return place


def states(folder, name, processes):
    return [load_file(folder / f"{name} in {processes}" / f"rank{rank}.safetensors") for rank in range(processes)]


def facts(folder, name, processes):
    return [json.loads((folder / f"{name} in {processes}" / f"rank{r}.json").read_text()) for r in range(processes)]


EVERY_RUN = pytest.mark.parametrize("name", ddp_worker.RUNS)


@EVERY_RUN
def test_two_processes_train_the_expert_that_one_process_trains(ddp, name):
    (one,), (two, _) = states(ddp, name, 1), states(ddp, name, 2)
    start = FlexOlmoForCausalLM.from_pretrained(ddp / "START").state_dict()

    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        if belongs_to(key, 1) or ".mlp.gate." in key:
            assert (tensor - start[key]).abs().max() > 1e-4, key


@EVERY_RUN
def test_the_losses_that_are_logged_are_the_same(ddp, name):
    (one,), (two, _) = facts(ddp, name, 1), facts(ddp, name, 2)

    assert two["losses"] == pytest.approx(one["losses"], abs=2e-5)


@EVERY_RUN
def test_every_process_ends_with_the_same_model_and_frozen_tensors_as_they_were(ddp, name):
    first, second = states(ddp, name, 2)
    (alone,), both = facts(ddp, name, 1), facts(ddp, name, 2)

    assert all(torch.equal(first[key], second[key]) for key in first)
    assert both[0]["frozen"] == both[1]["frozen"] == alone["frozen"]


@EVERY_RUN
def test_no_search_for_unused_parameters_is_needed(ddp, name):
    for found in facts(ddp, name, 2):
        assert found["wrapper"] == "DistributedDataParallel"
        assert found["find unused"] is False


def test_what_two_processes_save_loads_as_the_model_that_was_trained(ddp):
    (state, _) = states(ddp, "sgd", 2)
    loaded = FlexOlmoForCausalLM.from_pretrained(ddp / "sgd in 2" / "final").state_dict()

    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


@pytest.fixture(scope="module")
def sharded(place):
    """The folder with what `fsdp_worker` wrote in two processes, and the model trained in one."""
    launch(HERE / "fsdp_worker.py", place)
    model, optimizer = fsdp_worker.built(place)
    fsdp_worker.train(model, optimizer, [1, 2, 3])
    return place, model


def test_a_sharded_model_is_trained_as_a_whole_one_is(sharded):
    place, model = sharded
    found, start = load_file(place / "whole.safetensors"), load_file_of_start(place)

    assert found.keys() == start.keys()
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(found[key], tensor, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        moves = belongs_to(key, 1) or ".mlp.gate." in key
        assert torch.equal(found[key], start[key]) is not moves, key
        if moves and not belongs_to(key, 1):
            assert torch.equal(found[key][0], start[key][0]), key


def load_file_of_start(place):
    return FlexOlmoForCausalLM.from_pretrained(place / "START").state_dict()


def test_every_shard_of_what_is_frozen_stays_as_it_was(sharded):
    for found in shard_facts(sharded[0]):
        assert found["frozen before"] == found["frozen after"]
        assert any(name.endswith("experts.0.up_proj.weight") for name in found["frozen before"])


def test_optimizer_state_is_shared_out(sharded):
    first, second = shard_facts(sharded[0])

    assert first["optimizer"] + second["optimizer"] == first["trained"]
    assert first["optimizer"] < 0.6 * first["trained"]


def shard_facts(place):
    return [json.loads((place / f"shards{rank}.json").read_text()) for rank in range(2)]


def test_a_run_restored_from_its_shards_ends_where_an_uninterrupted_one_does(sharded):
    whole, resumed = (load_file(sharded[0] / f"{name}.safetensors") for name in ("whole", "resumed"))

    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_full_state_dict_that_is_shared_out_again_is_the_same_bit_for_bit(sharded):
    whole, reloaded = (load_file(sharded[0] / f"{name}.safetensors") for name in ("whole", "reloaded"))

    assert all(torch.equal(whole[key], reloaded[key]) for key in whole)


def test_saving_an_expert_gathers_that_expert_and_nothing_else(sharded):
    found, _ = shard_facts(sharded[0])

    # One bias per layer is shared out as two, one of them padding.
    assert found["trained"] <= found["gathered for one expert"] <= found["trained"] + 2
    assert found["gathered for everything"] > 5 * found["gathered for one expert"]


def test_a_gathered_expert_makes_the_package_that_the_whole_model_makes(sharded):
    place, trained = sharded
    state = load_file(place / "expert.safetensors")
    start = FlexOlmoForCausalLM.from_pretrained(place / "START")
    load_expert_state(start, "math", state)
    package, whole = ExpertPackage.from_model(start, "math"), ExpertPackage.from_model(trained, "math")

    assert package.manifest.anchor == whole.manifest.anchor
    assert package.tensors.keys() == whole.tensors.keys()
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(package.tensors[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.parametrize("trained", [False, True], ids=["at rest", "while it is trained"])
def test_a_model_that_is_not_sharded_is_read_as_it_is(place, trained):
    from flexolmo_hf import freeze_except

    model = FlexOlmoForCausalLM.from_pretrained(place / "START")
    if trained:
        freeze_except(model, "math")
    package = ExpertPackage.from_model(model, "math")

    for name, tensor in expert_state(model, "math").items():
        assert torch.equal(tensor, package.tensors[name]), name
    assert expert_state(model, "math").keys() == {n for n in package.tensors if not n.endswith("public_row")}


@pytest.mark.parametrize("group", ["embeddings", "lm_head", "attention", "norms"])
def test_an_expert_is_not_gathered_without_the_shared_weights_that_were_trained_with_it(place, group):
    from flexolmo_hf import freeze_except

    model = FlexOlmoForCausalLM.from_pretrained(place / "START")
    freeze_except(model, "math", unfreeze_shared=[group])
    with pytest.raises(ConfigurationError, match=rf"\['{group}'\] are trained as well"):
        expert_state(model, "math")


def test_tensors_of_something_else_are_refused_and_change_nothing(place):
    model = FlexOlmoForCausalLM.from_pretrained(place / "START")
    before = expert_state(model, "math")
    lacking = {name: tensor + 1 for name, tensor in list(before.items())[1:]}

    with pytest.raises(ConfigurationError, match="not those of expert 'math'"):
        load_expert_state(model, "math", lacking)
    with pytest.raises(UnknownExpertError, match="Did you mean 'math'"):
        expert_state(model, "maht")
    assert all(torch.equal(tensor, before[name]) for name, tensor in expert_state(model, "math").items())


@pytest.fixture(scope="module")
def sharded_runs(ddp):
    """The folder, with the runs of `fsdp_trainer_worker` as well."""
    launch(HERE / "fsdp_trainer_worker.py", ddp)
    return ddp


EVERY_KIND = pytest.mark.parametrize("name", fsdp_trainer_worker.KINDS)


@EVERY_KIND
@pytest.mark.parametrize("way", ["", " resumed"], ids=["in one go", "resumed"])
def test_the_trainer_trains_a_sharded_model_as_a_whole_one(sharded_runs, name, way):
    (one,), (two, again) = states(sharded_runs, fsdp_trainer_worker.ALIKE, 1), states(sharded_runs, name + way, 2)
    start = load_file_of_start(sharded_runs)

    assert all(found["sharded"] for found in facts(sharded_runs, name + way, 2))
    for key, tensor in one.items():
        assert torch.equal(two[key], again[key]), key
        torch.testing.assert_close(two[key], tensor, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
        if not belongs_to(key, 1) and ".mlp.gate." not in key:
            assert torch.equal(two[key], start[key]), key


@EVERY_KIND
def test_a_sharded_run_is_found_again_and_says_that_nothing_frozen_moved(sharded_runs, name):
    folder = sharded_runs / f"{name} in 2"

    assert last_complete_checkpoint(folder).name == "checkpoint-3"
    for place in (folder, folder / "checkpoint-2", folder / "checkpoint-3"):
        proof = json.loads((place / "frozen.json").read_text())
        parts = proof["compared shard by shard"]
        assert parts["processes"] == 2
        assert parts["before"] == parts["after"] != proof["fingerprint before"]
        assert "fingerprint after" not in proof
    assert (folder / "checkpoint-3" / "run.json").is_file()


@EVERY_KIND
@pytest.mark.parametrize("where", ["in a step", "on disk"])
def test_a_frozen_shard_that_moves_stops_all_processes_before_anything_is_saved(sharded_runs, name, where):
    told = [json.loads((sharded_runs / f"{name} spoilt {rank}.json").read_text())[where] for rank in range(2)]

    assert told[0] == told[1]
    assert len(told[0]) == 1
    assert told[0][0].endswith(fsdp_trainer_worker.FROZEN)
    assert [path.name for path in (sharded_runs / f"{name} spoilt in 2").iterdir()] == ["checkpoint-2"]


@EVERY_KIND
def test_a_resumed_sharded_run_compares_with_the_parts_of_the_first_start(sharded_runs, name):
    first, resumed = (
        json.loads((sharded_runs / f"{name} in 2" / place / "frozen.json").read_text())
        for place in ("checkpoint-2", ".")
    )

    assert resumed["step"] > first["step"]
    assert {**resumed, "step": 0} == {**first, "step": 0}


def test_a_sharded_run_that_gathers_leaves_the_model_it_trained(sharded_runs):
    state, _ = states(sharded_runs, "fsdp full", 2)
    loaded = FlexOlmoForCausalLM.from_pretrained(sharded_runs / "fsdp full in 2" / "final").state_dict()

    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())


def test_the_command_trains_in_two_processes_what_it_trains_in_one(place):
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ddp_worker.TEXT))
    for processes in (1, 2):
        out = place / f"job in {processes}"
        job = {
            "model_path": str(place / "START"),
            "data": [str(place / "data.jsonl")],
            "expert": "math",
            "output_dir": str(out),
            "optim": "sgd",
            "learning_rate": 0.1,
            "max_steps": 2,
            "max_length": 32,
            "per_device_train_batch_size": 4 // processes,
            "ddp_find_unused_parameters": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        }
        (place / "job.yaml").write_text(yaml.safe_dump(job))
        said = launch("-m", "flexolmo_hf.cli", "train", "--config", place / "job.yaml", processes=processes)
        assert said.count("Wrote ") == 1
    one, two = (FlexOlmoForCausalLM.from_pretrained(place / f"job in {n}").state_dict() for n in (1, 2))

    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-6, rtol=0, msg=lambda text, key=key: f"{key}: {text}")
    assert not [path.name for path in (place / "job in 2").iterdir() if path.name.startswith(".")]
