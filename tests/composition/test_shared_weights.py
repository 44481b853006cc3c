"""Shared weights that were trained too are carried, refused, and averaged only when it is said."""

import json

import pytest
import torch

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM, freeze_except, merge_experts
from flexolmo_hf.composition.fingerprint import fingerprint_of
from flexolmo_hf.composition.shared_weights import SHARED, is_shared
from flexolmo_hf.composition.training_record import PostTraining
from flexolmo_hf.errors import ConfigurationError, DamagedFileError, NotAPackageError, SharedWeightsError
from tests.composition.conftest import move_expert
from tests.conftest import dense_model


@pytest.fixture
def dense(tmp_path):
    model = dense_model()
    model.save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def post_trained(dense, name, groups, seed):
    """Train an expert and shared weights, as numbers: a package, and the model it was taken from."""
    model = move_expert(FlexOlmoForCausalLM.from_dense(dense, expert=name), name)
    anchor = fingerprint_of(model)
    freeze_except(model, name, unfreeze_shared=groups)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad and ".mlp." not in key:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    moved = PostTraining(list(groups), anchor) if groups else None
    return ExpertPackage.from_model(model, name, post_training=moved), model


@pytest.mark.parametrize("groups", [["embeddings"], ["lm_head", "norms"], list(SHARED)], ids="+".join)
def test_merging_averages_what_moved_and_keeps_the_rest(tmp_path, dense, groups, input_ids):
    (math, math_model), (code, code_model) = post_trained(dense, "math", groups, 1), post_trained(dense, "code", [], 2)
    both = {"math": math, "code": code}
    with pytest.raises(SharedWeightsError, match="'math': " + ", ".join(groups)):
        merge_experts(dense, both, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()

    merge_experts(dense, both, tmp_path / "merged", average_shared=True)
    merged = FlexOlmoForCausalLM.from_pretrained(tmp_path / "merged")
    theirs, ours, plain = merged.state_dict(), math_model.state_dict(), code_model.state_dict()
    for key in plain:
        if ".mlp." not in key:
            expected = (ours[key] + plain[key]) / 2 if is_shared(key, groups) else plain[key]
            torch.testing.assert_close(theirs[key], expected, atol=0, rtol=1e-6)
    assert merged.config.shared_averaged
    assert "shared_averaged" in repr(merged.config)
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "is not exact" in card
    assert "absent, not merely unused" not in card


def test_a_package_carries_and_keeps_what_moved(tmp_path, dense):
    package, model = post_trained(dense, "math", ["lm_head"], 1)
    package.save_pretrained(tmp_path / "package")
    read = ExpertPackage.from_pretrained(tmp_path / "package")
    assert read.manifest.unfrozen == ["lm_head"]
    assert torch.equal(read.tensors["shared.lm_head.weight"], model.lm_head.weight)
    assert (
        read.parameters == sum(t.numel() for key, t in read.tensors.items() if not key.startswith("shared.")) - 2 * 64
    )
    card = (tmp_path / "package" / "README.md").read_text()
    assert "not exact" in card
    assert "lm_head" in card
    # Alone, its average is what it was trained to.
    merge_experts(dense, {"math": read}, tmp_path / "merged", average_shared=True)
    merged = FlexOlmoForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight, model.lm_head.weight)


def test_an_ordinary_package_says_nothing_of_it(tmp_path, dense):
    package, _ = post_trained(dense, "math", [], 1)
    package.save_pretrained(tmp_path / "package")
    assert "unfrozen" not in json.loads((tmp_path / "package" / "manifest.json").read_text())
    merge_experts(dense, {"math": package}, tmp_path / "merged", average_shared=True)
    assert not FlexOlmoForCausalLM.from_pretrained(tmp_path / "merged").config.shared_averaged
    for folder in ("package", "merged"):
        assert "not exact" not in (tmp_path / folder / "README.md").read_text()


def test_a_live_model_takes_no_such_package(tmp_path, dense):
    package, _ = post_trained(dense, "math", ["norms"], 1)
    model = FlexOlmoForCausalLM.from_dense(dense)
    with pytest.raises(SharedWeightsError):
        model.add_expert(package)
    assert model.expert_names == ["public"]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda manifest: manifest.update(unfrozen=["lm_head", "norms"]), DamagedFileError),
        (lambda manifest: manifest.update(unfrozen=[]), DamagedFileError),
        (lambda manifest: manifest.update(unfrozen=["everything"]), NotAPackageError),
        (lambda manifest: manifest.update(unfrozen="lm_head"), NotAPackageError),
    ],
    ids=["more than there is", "less than there is", "unknown", "no list"],
)
def test_a_manifest_that_does_not_fit_the_tensors_is_refused(tmp_path, dense, change, error):
    package, _ = post_trained(dense, "math", ["lm_head"], 1)
    package.save_pretrained(tmp_path / "package")
    file = tmp_path / "package" / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(error):
        ExpertPackage.from_pretrained(tmp_path / "package")


def test_only_shared_weights_can_be_named():
    from tests.modeling.test_expert_sets import named_model

    with pytest.raises(ConfigurationError, match=r"\['router'\]"):
        freeze_except(named_model(), "math", unfreeze_shared=["router"])
