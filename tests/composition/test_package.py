"""An expert package: whole when it is read, equal to what was packed, and refused when anything is off."""

import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM
from flexolmo_hf.composition import package as packages
from flexolmo_hf.errors import (
    ConfigurationError,
    DamagedFileError,
    ExpertNotLoadedError,
    FlexOlmoError,
    NonFiniteTensorError,
    NoSpaceError,
    NotAPackageError,
    OutputFolderNotEmptyError,
    UnknownExpertError,
)
from tests.composition.conftest import FULL, consortium, disk_with, forged, pack, tree

WEIGHTS = "expert.safetensors"
UP = "layers.1.up_proj.weight"
ROW = "layers.1.router.row"


@pytest.fixture
def model(one_owner):
    return one_owner.models["math"]


@pytest.fixture
def folder(one_owner):
    return one_owner.packages["math"]


@pytest.mark.parametrize("router_bias", [[], ["math"]], ids=["no bias", "bias"])
def test_what_is_read_equals_what_was_packed(tmp_path, router_bias):
    owners = consortium(tmp_path, ["math"], router_bias=router_bias)
    packed = ExpertPackage.from_model(owners.models["math"], "math")
    read = ExpertPackage.from_pretrained(owners.packages["math"])

    assert read.tensors.keys() == packed.tensors.keys()
    assert all(torch.equal(read.tensors[key], packed.tensors[key]) for key in read.tensors)
    assert read.manifest.anchor == packed.manifest.anchor
    assert read.manifest.router_bias == bool(router_bias)


def test_a_package_read_and_saved_again_is_the_same_bytes(folder, tmp_path):
    ExpertPackage.from_pretrained(folder).save_pretrained(tmp_path / "again")

    assert tree(tmp_path / "again") == tree(folder)


def test_it_holds_the_experts_matrices_rows_and_biases_and_nothing_of_another(tmp_path):
    owners = consortium(tmp_path, ["math"], router_bias=["math"])
    model, tensors = owners.models["math"], load_file(owners.packages["math"] / WEIGHTS)

    for layer, mixture in enumerate(model.mixtures):
        for name, parameter in mixture.experts["1"].named_parameters():
            assert torch.equal(tensors.pop(f"layers.{layer}.{name}"), parameter)
        assert torch.equal(tensors.pop(f"layers.{layer}.router.row"), mixture.gate.weight[1])
        assert torch.equal(tensors.pop(f"layers.{layer}.router.bias"), mixture.gate.bias[1:])
        assert torch.equal(tensors.pop(f"layers.{layer}.router.public_row"), mixture.gate.weight[0])
    assert tensors == {}


def test_it_is_three_files_of_which_none_is_a_pickle(folder):
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", WEIGHTS, "manifest.json"]


def test_its_parameters_are_what_the_model_has_more_with_the_expert(one_owner, model):
    without = FlexOlmoForCausalLM.from_dense(one_owner.anchor)

    more = model.num_parameters() - without.num_parameters()
    assert ExpertPackage.from_model(model, "math").parameters == more


def test_what_is_said_of_the_expert_is_read_back(model, tmp_path):
    about = {"training": {"steps": 2}, "evaluation": {"accuracy": 0.5}, "owner": "Ann", "license": "mit"}
    ExpertPackage.from_model(model, "math", **about).save_pretrained(tmp_path / "package")

    manifest = ExpertPackage.from_pretrained(tmp_path / "package").manifest
    assert {key: getattr(manifest, key) for key in about} == about


def test_the_set_in_force_does_not_change_what_is_packed(model, folder, tmp_path):
    with model.use_experts("public"):
        ExpertPackage.from_model(model, "math").save_pretrained(tmp_path / "switched off")

    assert tree(tmp_path / "switched off") == tree(folder)


def test_no_file_names_a_folder(model, tmp_path):
    model.save_pretrained(tmp_path / "trained")
    folder = pack(FlexOlmoForCausalLM.from_pretrained(tmp_path / "trained"), "math", tmp_path / "package")

    assert not any(str(tmp_path).encode() in file.read_bytes() for file in folder.iterdir())


class FakeHub:
    """Stands in for `huggingface_hub.HfApi` and keeps what it was asked to publish."""

    def __init__(self, token=None):
        FakeHub.published, FakeHub.token = None, token

    def create_repo(self, repo_id, *, private, exist_ok):
        FakeHub.private = private

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, commit_message):
        FakeHub.published = {name.as_posix(): digest for name, digest in tree(folder_path).items()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit")


def test_what_is_pushed_is_what_is_saved_in_a_private_repository(folder, monkeypatch):
    monkeypatch.setattr(packages, "HfApi", FakeHub)
    address = ExpertPackage.from_pretrained(folder).push_to_hub("ann/math", token="secret")

    assert FakeHub.published == {name.as_posix(): digest for name, digest in tree(folder).items()}
    assert (FakeHub.private, FakeHub.token, address) == (True, "secret", "https://hub/ann/math/commit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["expert", "row"])
def test_a_diverged_expert_is_not_packed(model, refused, where, value):
    mixture = model.mixtures[1]
    tensor = mixture.gate.weight[1] if where == "row" else mixture.experts["1"].up_proj.weight
    with torch.no_grad():
        tensor.view(-1)[-1] = value

    with refused(NonFiniteTensorError, "'math'", ROW if where == "row" else UP):
        ExpertPackage.from_model(model, "math")


def test_the_public_expert_is_not_packed(model, refused):
    with refused(ConfigurationError, "'public'"):
        ExpertPackage.from_model(model, "public")


def test_an_unknown_expert_is_not_packed(model, refused):
    with refused(UnknownExpertError, "'maht'", "Did you mean 'math'?"):
        ExpertPackage.from_model(model, "maht")


@pytest.mark.parametrize("loaded", ["public", "math"])
def test_an_expert_is_packed_beside_the_public_one_or_not_at_all(model, tmp_path, refused, loaded):
    model.save_pretrained(tmp_path / "both")
    partial = FlexOlmoForCausalLM.from_pretrained(tmp_path / "both", active_experts=[loaded])

    with refused(ExpertNotLoadedError, "active_experts="):
        ExpertPackage.from_model(partial, "math")


@pytest.mark.parametrize("taken_by", ["package/notes.txt", "package"])
def test_a_folder_that_is_taken_is_not_written_to(model, tmp_path, refused, taken_by):
    (tmp_path / taken_by).parent.mkdir(exist_ok=True)
    (tmp_path / taken_by).write_text("mine")

    with refused(OutputFolderNotEmptyError, "'package'"):
        ExpertPackage.from_model(model, "math").save_pretrained(tmp_path / "package")


def test_a_full_disk_is_named_and_leaves_nothing(model, tmp_path, monkeypatch, refused):
    def fill_up(tensors, path, **kwargs):
        path.write_bytes(b"the beginning of")
        raise OSError(28, FULL)

    monkeypatch.setattr(packages, "save_file", fill_up)
    with refused(NoSpaceError, "free on the output disk"):
        ExpertPackage.from_model(model, "math").save_pretrained(tmp_path / "package")


def test_a_disk_that_is_too_small_is_refused_at_once(model, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(packages, "save_file", None)
    monkeypatch.setattr("flexolmo_hf._folder.shutil.disk_usage", disk_with(free=1000))

    with refused(NoSpaceError, "needed"):
        ExpertPackage.from_model(model, "math").save_pretrained(tmp_path / "package")


@pytest.mark.parametrize("at", [-1, -70_000], ids=["last byte", "in the middle"])
def test_a_tampered_byte_is_noticed(folder, refused, at):
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[at] ^= 1
    (folder / WEIGHTS).write_bytes(content)

    with refused(DamagedFileError, WEIGHTS, "sha256 differs"):
        ExpertPackage.from_pretrained(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, -1])
def test_a_truncated_file_is_noticed(folder, refused, kept):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:kept])

    with refused(DamagedFileError, WEIGHTS, "truncated"):
        ExpertPackage.from_pretrained(folder)


def test_missing_weights_are_noticed(folder, refused):
    (folder / WEIGHTS).unlink()

    with refused(DamagedFileError, WEIGHTS, "missing"):
        ExpertPackage.from_pretrained(folder)


def test_a_pickle_in_place_of_the_weights_is_not_unpickled(folder, refused):
    (folder / WEIGHTS).write_bytes(pickle.dumps({"weight": 1}))

    with refused(DamagedFileError, WEIGHTS):
        ExpertPackage.from_pretrained(folder)


def test_a_folder_without_a_manifest_is_no_package(folder, refused):
    (folder / "manifest.json").unlink()

    with refused(NotAPackageError, repr(folder.name), "there is no manifest.json"):
        ExpertPackage.from_pretrained(folder)


@pytest.mark.parametrize("place", ["nowhere", "package-math/README.md"])
def test_a_place_that_is_no_folder_is_no_package(one_owner, refused, place):
    with refused(NotAPackageError, "there is no such folder"):
        ExpertPackage.from_pretrained(one_owner.folder / place)


def test_a_repository_that_cannot_be_reached_is_no_package(refused):
    with refused(NotAPackageError, "'nothing'", "Hub repository"):
        ExpertPackage.from_pretrained("nobody/nothing")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused_though_their_hash_is_right(folder, refused, value):
    diverged = forged(folder, lambda tensors: tensors[UP][0].fill_(value))

    with refused(NonFiniteTensorError, UP, "'math'"):
        ExpertPackage.from_pretrained(diverged)


FORGERIES = {
    "a matrix is missing": lambda tensors: tensors.pop(UP),
    "a router row is missing": lambda tensors: tensors.pop(ROW),
    "a whole layer is missing": lambda tensors: [tensors.pop(key) for key in list(tensors) if "layers.1" in key],
    "a layer too many": lambda tensors: tensors.update({UP.replace("1", "2"): tensors[UP].clone()}),
    "a matrix has another shape": lambda tensors: tensors.update({UP: tensors[UP][:-1]}),
    "a router row has another shape": lambda tensors: tensors.update({ROW: tensors[ROW][:-1]}),
    "a matrix has another dtype": lambda tensors: tensors.update({UP: tensors[UP].bfloat16()}),
    "a tensor that belongs to no expert": lambda tensors: tensors.update(surprise=torch.ones(3)),
    "a layer without a number": lambda tensors: tensors.update({"layers.x.router.row": tensors[ROW].clone()}),
    "a bias that was not announced": lambda tensors: tensors.update({"layers.1.router.bias": torch.ones(1)}),
}


@pytest.mark.parametrize("change", FORGERIES.values(), ids=FORGERIES)
def test_tensors_that_are_not_one_experts_are_refused_though_manifest_and_hash_agree(folder, refused, change):
    with_other_tensors = forged(folder, change)

    with refused(FlexOlmoError):
        ExpertPackage.from_pretrained(with_other_tensors)


def test_biases_that_are_announced_and_missing_are_refused(folder, refused):
    without_biases = forged(folder, router_bias=True)

    with refused(FlexOlmoError, "layers.0.router.bias"):
        ExpertPackage.from_pretrained(without_biases)


def test_a_manifest_that_lists_other_tensors_is_noticed(folder, refused):
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tensors"][UP] = [[1, 1], "float32"]
    (folder / "manifest.json").write_text(json.dumps(manifest))

    with refused(DamagedFileError, WEIGHTS, "not those the manifest lists"):
        ExpertPackage.from_pretrained(folder)


def test_an_expert_that_diverges_between_taking_and_saving_is_not_saved(model, tmp_path, refused):
    package = ExpertPackage.from_model(model, "math")
    with torch.no_grad():
        model.expert_modules("math")[0].up_proj.weight[0] = float("nan")

    with refused(NonFiniteTensorError, "layers.0.up_proj.weight"):
        package.save_pretrained(tmp_path / "package")
