"""The experts of a nameless checkpoint get their names from experts whose names are known, or no name at all."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexolmo_hf import (
    ExpertPackage,
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    identify_experts,
    inspect_checkpoint,
    merge_experts,
)
from flexolmo_hf.errors import (
    AmbiguousExpertError,
    CheckpointNotFoundError,
    ConfigurationError,
    DamagedFileError,
    DuplicateExpertError,
    InvalidExpertNameError,
    NotFlexOlmoError,
    UnknownExpertError,
)
from flexolmo_hf.modeling.files.sidecar import NAMES_FILE, read_expert_names, write_expert_names
from tests.composition.conftest import consortium, edit_json, edit_weights, logits, tree

THREE = ["math", "code", "news"]


@pytest.fixture
def released(tmp_path):
    """A merged checkpoint `released` whose configuration has no names, and what its owners have beside it."""
    owners = consortium(tmp_path, THREE)
    merge_experts(owners.anchor, {name: owners.packages[name] for name in ("news", "math", "code")}, tmp_path / "all")
    nameless(tmp_path / "all", tmp_path / "released")
    for name, model in owners.models.items():
        model.save_pretrained(tmp_path / f"two-{name}")
    return tmp_path


def nameless(folder, copy):
    """Copy a checkpoint as upstream would have written it: without our settings."""
    shutil.copytree(folder, copy)
    ours = ("expert_names", "active_experts", "router_bias")
    edit_json(copy / "config.json", lambda settings: [settings.pop(key, None) for key in ours])
    return copy


def permuted(folder, order):
    """Renumber the experts of a checkpoint of several files: `order` gives the old index of each new one."""
    moved = {f".experts.{old}.": f".experts.{new}." for new, old in enumerate(order)}

    def renamed(key):
        part = next((part for part in moved if part in key), None)
        return key.replace(part, moved[part]) if part else key

    def change(tensors):
        new = {renamed(key): t[order].clone() if ".mlp.gate." in key else t for key, t in tensors.items()}
        tensors.clear()
        tensors.update(new)

    for file in folder.glob("*.safetensors"):
        edit_weights(file, change)

    def index(content):
        content["weight_map"] = {renamed(key): file for key, file in content["weight_map"].items()}

    edit_json(folder / "model.safetensors.index.json", index)


def rounded(folder, copy, dtype=torch.bfloat16):
    """Save a checkpoint's numbers, rounded to bfloat16, in a dtype."""
    FlexOlmoForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(dtype).save_pretrained(copy)
    return copy


def packages(place, *names):
    return {name: place / f"package-{name}" for name in names}


def found(result):
    return [(expert.name, expert.match) for expert in result.experts]


def everything(place):
    return {**packages(place, *THREE), "public": place / "anchor"}


def test_every_expert_is_found_by_its_package_and_the_public_one_by_the_dense_model(released):
    result = identify_experts(released / "released", everything(released))

    assert found(result) == [(name, "identical") for name in ("public", "news", "math", "code")]
    assert [(expert.index, expert.distance) for expert in result.experts] == [(n, 0.0) for n in range(4)]
    assert result.unmatched == {}


@pytest.mark.parametrize("order", [[0, 3, 1, 2], [2, 0, 3, 1], [3, 2, 1, 0]], ids=str)
def test_experts_are_found_wherever_they_stand(released, order):
    permuted(released / "released", order)
    result = identify_experts(released / "released", everything(released))

    assert result.expert_names == [["public", "news", "math", "code"][old] for old in order]


def test_a_reference_may_be_a_checkpoint_of_two_experts(released):
    references = {name: nameless(released / f"two-{name}", released / f"bare-{name}") for name in THREE}
    result = identify_experts(released / "released", references)

    assert found(result) == [("public", "none"), ("news", "identical"), ("math", "identical"), ("code", "identical")]


def test_references_bring_their_own_names(released):
    references = [released / "package-math", released / "two-code", released / "anchor", f"press={released}/two-news"]
    result = identify_experts(released / "released", references)

    assert result.expert_names == ["public", "press", "math", "code"]


def test_a_given_name_wins_over_a_packages_own(released):
    result = identify_experts(released / "released", {"algebra": released / "package-math"})

    assert result.expert_names == ["public", "expert_1", "algebra", "expert_3"]


def test_a_name_tells_which_of_several_experts_of_a_reference_is_meant(released):
    result = identify_experts(released / "released", {"code": released / "all", "public": released / "two-math"})

    assert found(result) == [("public", "identical"), ("expert_1", "none"), ("expert_2", "none"), ("code", "identical")]


@pytest.mark.parametrize("coarse", ["released", "references"])
def test_of_two_dtypes_the_coarser_one_decides(released, coarse):
    checkpoint, references = released / "released", [released / f"two-{name}" for name in THREE]
    if coarse == "released":
        checkpoint = rounded(checkpoint, released / "half")
    else:
        references = [rounded(folder, released / f"half-{folder.name}") for folder in references]
    result = identify_experts(checkpoint, references)

    assert found(result)[1:] == [("news", "identical"), ("math", "identical"), ("code", "identical")]


def test_a_copy_that_was_rounded_on_its_way_is_the_nearest_one_and_the_distance_says_so(released):
    # In float32 again, it is not what the reference is in float32.
    checkpoint = rounded(released / "released", released / "through half", torch.float32)
    result = identify_experts(checkpoint, packages(released, *THREE))

    assert found(result) == [("public", "none"), ("news", "nearest"), ("math", "nearest"), ("code", "nearest")]
    assert all(1e-4 < expert.distance < 1e-2 for expert in result.experts[1:])


def test_one_number_that_differs_outside_the_sample_is_not_overlooked(released):
    key = "model.layers.1.mlp.experts.2.down_proj.weight"
    file = released / "released/model-expert-math-00001-of-00001.safetensors"
    edit_weights(file, lambda tensors: tensors[key][-1, -1].mul_(2))
    result = identify_experts(released / "released", packages(released, *THREE))

    assert found(result)[1:] == [("news", "identical"), ("math", "nearest"), ("code", "identical")]
    assert 0 < result.experts[2].distance < 1e-2


def test_a_reference_that_is_not_there_names_nothing(released):
    merge_experts(released / "anchor", packages(released, "math", "news"), released / "without code")
    result = identify_experts(
        nameless(released / "without code", released / "bare"), packages(released, "math", "code")
    )

    assert found(result) == [("public", "none"), ("math", "identical"), ("expert_2", "none")]
    assert list(result.unmatched) == ["code"]
    assert result.unmatched["code"] > 0.1
    assert "code" in result.table()


def test_an_expert_that_is_only_akin_is_not_taken_for_the_one_looked_for(released):
    # Trained so briefly that it is still as close to the public expert as a rounded copy would be.
    brief = FlexOlmoForCausalLM.from_dense(released / "anchor", expert="poems")
    with torch.no_grad():
        for module in brief.expert_modules("poems"):
            for parameter in module.parameters():
                parameter.mul_(1.001)
    brief.save_pretrained(released / "poems")
    other = FlexOlmoForCausalLM.from_pretrained(released / "poems")
    with torch.no_grad():
        for module in other.expert_modules("poems"):
            for parameter in module.parameters():
                parameter.mul_(1.001)
    other.save_pretrained(released / "other")
    nameless(released / "poems", released / "bare")

    with pytest.raises(AmbiguousExpertError, match="fits experts 0, 1"):
        identify_experts(released / "bare", {"other": released / "other"})
    assert found(identify_experts(released / "bare", {"poems": released / "poems"})) == [
        ("public", "none"),
        ("poems", "identical"),
    ]


def test_a_ruined_expert_is_none_of_the_references_and_hides_no_other(released):
    checkpoint = rounded(released / "released", released / "through half", torch.float32)
    key = "model.layers.0.mlp.experts.0.gate_proj.weight"
    edit_weights(checkpoint / "model.safetensors", lambda tensors: tensors[key].fill_(float("nan")))
    result = identify_experts(checkpoint, everything(released))

    assert found(result) == [("public", "none"), ("news", "nearest"), ("math", "nearest"), ("code", "nearest")]
    assert list(result.unmatched) == ["public"]


def test_two_experts_that_are_the_same_are_not_told_apart(released, refused):
    untrained = FlexOlmoForCausalLM.from_dense(released / "anchor", expert="poems")
    untrained.save_pretrained(released / "untrained")

    with refused(AmbiguousExpertError, "Reference 'public' fits experts 0, 1"):
        identify_experts(released / "untrained", {"public": released / "anchor"}, write=True)


def test_two_references_for_one_expert_are_refused(released, refused):
    both = {"math": released / "package-math", "algebra": released / "two-math"}

    with refused(AmbiguousExpertError, "References 'math', 'algebra' fit expert 2"):
        identify_experts(released / "released", both, write=True)


def test_the_public_expert_found_elsewhere_leaves_its_default_name_to_no_one_else(released):
    permuted(released / "released", [2, 0, 3, 1])
    result = identify_experts(released / "released", {"public": released / "anchor"})

    assert result.expert_names == ["expert_0", "public", "expert_2", "expert_3"]


# What is refused.


def test_a_reference_of_other_sizes_is_refused_with_both_sizes(released, refused):
    consortium(released / "large", ["math"], hidden_size=128, num_hidden_layers=3)

    for folder in ("package-math", "anchor"):
        with refused(ConfigurationError, "hidden_size 128 instead of 64", "num_hidden_layers 3 instead of 2"):
            identify_experts(released / "released", {"math": released / "large" / folder})


def test_a_reference_that_does_not_say_its_name_is_refused(released, refused):
    nameless(released / "two-math", released / "bare")

    with refused(ConfigurationError, "'bare' does not say how its expert is called", "math=FOLDER"):
        identify_experts(released / "released", [released / "bare"])


def test_a_reference_with_several_experts_is_refused_if_the_name_is_none_of_theirs(released, refused):
    with refused(ConfigurationError, "['public', 'news', 'math', 'code']", "which one is meant"):
        identify_experts(released / "released", {"poems": released / "all"})


@pytest.mark.parametrize(
    ("references", "kind", "says"),
    [
        ({}, ConfigurationError, "no reference"),
        ({"math": "nowhere/at/all"}, CheckpointNotFoundError, "'all'"),
        ({"math": "empty"}, DamagedFileError, "config.json"),
        ({"a/b": "package-math"}, InvalidExpertNameError, "'a/b'"),
        (["package-math", "two-math"], DuplicateExpertError, "'math' appears twice"),
    ],
    ids=["none", "nowhere", "no checkpoint", "unusable name", "one name twice"],
)
def test_references_that_make_no_sense_are_refused(released, refused, monkeypatch, references, kind, says):
    monkeypatch.chdir(released)
    (released / "empty").mkdir()

    with refused(kind, says):
        identify_experts(released / "released", references, write=True)


def test_a_dense_model_has_no_experts_to_name(released, refused):
    with refused(NotFlexOlmoError, "'olmo2'"):
        identify_experts(released / "anchor", packages(released, "math"))


def test_beside_a_repository_nothing_is_written_and_nothing_downloaded(released, refused):
    with refused(ConfigurationError, "'owner/name' is a repository", "Download it"):
        identify_experts("owner/name", packages(released, "math"), write=True)


# The file beside the checkpoint.


def test_nothing_is_written_unless_asked_for(released):
    before = tree(released)
    identify_experts(released / "released", everything(released))

    assert tree(released) == before


def test_the_file_holds_one_name_per_expert_and_nothing_else(released):
    result = identify_experts(released / "released", packages(released, "math"), write=True)

    assert result.written
    assert json.loads((released / "released" / NAMES_FILE).read_text()) == {
        "format": "flexolmo-expert-names",
        "version": 1,
        "expert_names": ["public", "expert_1", "math", "expert_3"],
    }


def test_a_later_load_knows_the_experts_by_these_names(released, input_ids):
    by_index = FlexOlmoForCausalLM.from_pretrained(released / "released", active_experts=["public", "expert_2"])
    identify_experts(released / "released", packages(released, *THREE), write=True)
    chosen = ["public", "math"]
    loaded = AutoModelForCausalLM.from_pretrained(released / "released", active_experts=chosen)
    directly = FlexOlmoForCausalLM.from_pretrained(released / "released", active_experts=chosen)

    assert AutoConfig.from_pretrained(released / "released").expert_names == ["public", "news", "math", "code"]
    assert FlexOlmoConfig.from_pretrained(released / "released").expert_names == ["public", "news", "math", "code"]
    assert [expert.name for expert in inspect_checkpoint(released / "released").experts][1:] == ["news", "math", "code"]
    assert torch.equal(logits(loaded, input_ids), logits(by_index, input_ids))
    assert torch.equal(logits(directly, input_ids), logits(by_index, input_ids))
    with pytest.raises(UnknownExpertError):
        AutoModelForCausalLM.from_pretrained(released / "released", active_experts=["expert_2"])


def test_a_second_comparison_keeps_the_names_of_the_first(released):
    identify_experts(released / "released", packages(released, "math"), write=True)
    again = identify_experts(released / "released", packages(released, "code"), write=True)

    assert found(again) == [("public", "none"), ("expert_1", "none"), ("math", "none"), ("code", "identical")]
    assert read_expert_names(released / "released", 4) == ["public", "expert_1", "math", "code"]


def test_names_that_are_known_already_are_not_written_again(released):
    result = identify_experts(released / "all", everything(released), write=True)

    assert not result.written
    assert not (released / "all" / NAMES_FILE).exists()


def test_names_in_the_configuration_are_not_contradicted(released, refused):
    with refused(ConfigurationError, "['public', 'news', 'math', 'code']", "'algebra'", "--no-write"):
        identify_experts(released / "all", {"algebra": released / "package-math"}, write=True)


def test_a_set_in_force_that_was_saved_without_names_is_translated(released):
    edit_json(released / "released/config.json", lambda s: s.update(active_experts=["public", "expert_2"]))
    write_expert_names(released / "released", ["public", "news", "math", "code"])

    assert FlexOlmoForCausalLM.from_pretrained(released / "released").expert_names == ["public", "math"]


def test_names_in_the_configuration_and_other_names_beside_it_are_refused(released, refused):
    write_expert_names(released / "all", ["public", "math", "news", "code"])

    for load in (AutoConfig, FlexOlmoConfig, AutoModelForCausalLM, FlexOlmoForCausalLM):
        with refused(ConfigurationError, "['public', 'news', 'math', 'code']", f"Remove {NAMES_FILE}"):
            load.from_pretrained(released / "all")
    write_expert_names(released / "all", ["public", "news", "math", "code"])
    assert FlexOlmoConfig.from_pretrained(released / "all").expert_names == ["public", "news", "math", "code"]


def names_file(**changes):
    content = {"format": "flexolmo-expert-names", "version": 1, "expert_names": ["public", "a", "b", "c"], **changes}
    return json.dumps(content)


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("{", DamagedFileError, "not JSON"),
        ("[]", DamagedFileError, "does not hold the names"),
        (names_file(format="other"), DamagedFileError, "does not hold the names"),
        (names_file(version=2), DamagedFileError, "version 2"),
        (names_file(expert_names=["public", "a"]), DamagedFileError, "names 2 experts, but the checkpoint has 4"),
        (names_file(expert_names="abcd"), DamagedFileError, "names no experts"),
        (names_file(expert_names=["public", "a", "A", "c"]), DuplicateExpertError, "'A' appears twice"),
        (names_file(expert_names=["public", "../a", "b", "c"]), InvalidExpertNameError, "'../a'"),
        (names_file(expert_names=["public", 1, "b", "c"]), InvalidExpertNameError, "1"),
    ],
    ids=["no JSON", "a list", "format", "version", "count", "text", "twice", "a path", "a number"],
)
def test_a_file_of_names_that_cannot_be_right_is_refused(released, refused, text, kind, says):
    (released / "released" / NAMES_FILE).write_text(text)

    with refused(kind, says):
        read_expert_names(released / "released", 4)
    with refused(kind, says):
        AutoConfig.from_pretrained(released / "released")


def test_without_the_file_there_are_no_names(released):
    assert read_expert_names(released / "released", 4) is None


def test_a_write_that_fails_leaves_the_former_names(released, refused, monkeypatch):
    write_expert_names(released / "released", ["public", "a", "b", "c"])
    monkeypatch.setattr(
        "flexolmo_hf.modeling.files.sidecar.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("full"))
    )
    before = tree(released)

    with pytest.raises(OSError, match="full"):
        write_expert_names(released / "released", ["public", "x", "y", "z"])
    with pytest.raises(InvalidExpertNameError):
        write_expert_names(released / "released", ["public", "x/y", "y", "z"])
    assert tree(released) == before


def test_experts_of_other_forms_are_refused(tmp_path, two_owners):
    package = ExpertPackage.from_pretrained(two_owners.packages["math"])
    package.compress(2, anchor=two_owners.anchor).save_pretrained(tmp_path / "small")
    merge_experts(two_owners.anchor, two_owners.packages, tmp_path / "merged")
    merge_experts(two_owners.anchor, {"math": tmp_path / "small"}, tmp_path / "mixed")
    with pytest.raises(ConfigurationError, match="'small' holds an expert that is low-rank"):
        identify_experts(tmp_path / "merged", [tmp_path / "small"])
    with pytest.raises(ConfigurationError, match="The checkpoint holds an expert that is low-rank"):
        identify_experts(tmp_path / "mixed", [two_owners.packages["math"]])
