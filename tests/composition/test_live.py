"""Experts come and go in a live model, and leave it as if they had always, or never, been there."""

import gc
import weakref

import pytest
import torch
from transformers import DynamicCache

from flexolmo_hf import ExpertPackage, FlexOlmoForCausalLM, freeze_except, merge_experts, unfreeze
from flexolmo_hf.errors import (
    AnchorMismatchError,
    ConfigurationError,
    DamagedFileError,
    DuplicateExpertError,
    EmptyExpertSetError,
    ExpertNotLoadedError,
    ExpertsChangedError,
    ForeignCacheError,
    IncompleteCheckpointError,
    InvalidExpertNameError,
    NotAPackageError,
    UnknownExpertError,
)
from tests.composition.conftest import consortium, edit_weights, logits

WAYS = pytest.mark.parametrize("way", ["auto", "grouped_mm"])


@pytest.fixture
def place(tmp_path):
    """Two owners' packages; `both`, `math` and `code`: what merging makes of them."""
    owners = consortium(tmp_path)
    merge_experts(owners.anchor, owners.packages, tmp_path / "both")
    for name in ("math", "code"):
        merge_experts(owners.anchor, {name: owners.packages[name]}, tmp_path / name)
    return tmp_path


def load(folder, *names, **options):
    return FlexOlmoForCausalLM.from_pretrained(folder, active_experts=list(names) or None, **options)


def tokens(model, input_ids):
    return model.generate(input_ids, max_new_tokens=5, do_sample=False)


@WAYS
def test_an_added_expert_is_as_if_it_had_always_been_there(place, input_ids, way):
    model, merged = load(place / "math"), load(place / "both")
    for one in (model, merged):
        one.set_experts_implementation(way)
    logits(model, input_ids)
    model.add_expert(place / "package-code")

    assert model.expert_names == model.active_experts == model.config.expert_names == ["public", "math", "code"]
    assert model.config.num_experts == model.config.num_experts_per_tok == 3
    assert torch.equal(logits(model, input_ids), logits(merged, input_ids))
    assert torch.equal(tokens(model, input_ids), tokens(merged, input_ids))
    assert model.expert_set_key() == merged.expert_set_key()


@WAYS
def test_a_removed_expert_is_as_if_it_had_never_been_there(place, input_ids, way):
    model, never = load(place / "both"), load(place / "math")
    for one in (model, never):
        one.set_experts_implementation(way)
    logits(model, input_ids)
    model.remove_expert("code")

    assert model.expert_names == model.active_experts == ["public", "math"]
    assert torch.equal(logits(model, input_ids), logits(never, input_ids))
    assert torch.equal(tokens(model, input_ids), tokens(never, input_ids))
    assert model.expert_set_key() == never.expert_set_key()
    with pytest.raises(ExpertNotLoadedError):
        model.set_active_experts(["code"])


@WAYS
@pytest.mark.parametrize("name", ["public", "math", "code"])
def test_an_expert_that_was_left_out_is_loaded_to_its_place(place, input_ids, name, way):
    whole = load(place / "both")
    rest = [other for other in whole.expert_names if other != name]
    part = load(place / "both", *rest)
    part.set_experts_implementation(way)
    whole.set_experts_implementation(way)
    logits(part, input_ids)
    part.load_expert(name)

    assert part.expert_names == whole.expert_names
    assert [list(mixture.experts) for mixture in part.mixtures] == [["0", "1", "2"]] * 2
    assert torch.equal(logits(part, input_ids), logits(whole, input_ids))


def test_only_the_files_of_an_expert_are_opened_for_it(place, input_ids):
    model, want = load(place / "both", "public"), load(place / "both", "public", "code")
    (place / "both/model-expert-math-00001-of-00001.safetensors").write_bytes(b"garbage")
    model.load_expert("code")

    assert torch.equal(logits(model, input_ids), logits(want, input_ids))
    with pytest.raises(DamagedFileError):
        model.load_expert("math")
    assert model.expert_names == ["public", "code"]


def test_removing_gives_the_memory_back(place, input_ids):
    model = load(place / "both")
    logits(model, input_ids)
    with model.use_experts("public", "code"):
        logits(model, input_ids)
    gone = [weakref.ref(p) for module in model.expert_modules("code") for p in module.parameters()]
    model.remove_expert("code")
    gc.collect()

    assert [ref() for ref in gone] == [None] * 6


def kept_bytes(model):
    """Return the bytes of memory that the experts hold, whatever holds it."""
    held = {}
    for expert in (expert for mixture in model.mixtures for expert in mixture.experts.values()):
        joined = () if expert.joined is None else expert.joined.storages
        for storage in (*(parameter.untyped_storage() for parameter in expert.parameters()), *joined):
            held[storage.data_ptr()] = storage.nbytes()
    return sum(held.values())


@pytest.mark.parametrize("change", ["an expert is removed", "they become smaller"])
@torch.no_grad()
def test_experts_that_ran_keep_no_memory_that_they_left(place, input_ids, change):
    model, removed = load(place / "both"), change == "an expert is removed"
    if removed:
        model.pack_experts()
    logits(model, input_ids)
    before = kept_bytes(model)
    # What is not in force does not run again, and so would never notice.
    model.set_active_experts(["public", "code"])
    if removed:
        model.remove_expert("math")
    else:
        model.to(torch.bfloat16)

    assert kept_bytes(model) == before * (2 / 3 if removed else 1 / 2)


CHANGES = {
    "added": lambda model, place: model.add_expert(place / "package-code"),
    "added from memory": lambda model, place: model.add_expert(ExpertPackage.from_pretrained(place / "package-code")),
    "new": lambda model, place: model.new_expert("law", bias_start=-1.0),
    "removed": lambda model, place: model.remove_expert("math"),
    "loaded again": lambda model, place: (model.remove_expert("math"), model.load_expert("math")),
    "chosen": lambda model, place: model.set_active_experts(["public"]),
    "trained": lambda model, place: freeze_except(model, "math"),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changed_in_inference_mode_can_still_be_trained(place, input_ids, change):
    model = load(place / "math")
    with torch.inference_mode():
        change(model, place)
        logits(model, input_ids)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(input_ids, labels=input_ids).loss.backward()
    assert any(parameter.grad is not None for parameter in model.mixtures[0].parameters())


def test_an_expert_comes_back_from_where_it_was(place, input_ids):
    model = load(place / "math")
    before = logits(model, input_ids)
    model.add_expert(str(place / "package-code"), "source")
    with_it = logits(model, input_ids)
    for name in ("source", "math"):
        model.remove_expert(name)
    for name in ("math", "source"):
        model.load_expert(name)

    assert model.expert_names == ["public", "math", "source"]
    assert torch.equal(logits(model, input_ids), with_it)
    model.remove_expert("source")
    assert torch.equal(logits(model, input_ids), before)


def test_a_set_in_force_stays_in_force(place, input_ids):
    model = load(place / "math")
    model.set_active_experts(["public"])
    before = logits(model, input_ids)
    model.add_expert(place / "package-code")
    assert model.active_experts == model.config.active_experts == ["public"]
    assert torch.equal(logits(model, input_ids), before)
    model.remove_expert("math")
    model.load_expert("math")
    assert model.active_experts == ["public"]


def test_a_package_at_hand_is_not_shared_with_the_model_it_came_from(place, input_ids):
    model = load(place / "math")
    model.add_expert(ExpertPackage.from_model(load(place / "code"), "code"))
    owner = load(place / "code")
    package = ExpertPackage.from_model(owner, "code")
    other = load(place / "math")
    other.add_expert(package)
    want = logits(other, input_ids)
    with torch.no_grad():
        owner.expert_modules("code")[0].up_proj.weight.zero_()

    assert torch.equal(logits(other, input_ids), want)
    other.remove_expert("code")
    with pytest.raises(ConfigurationError, match="lies nowhere that is known"):
        other.source = None
        other.load_expert("code")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rounded_model_takes_a_package_of_its_files_anchor(place, input_ids, dtype):
    model = load(place / "math", dtype=dtype)
    model.add_expert(place / "package-code")

    assert {p.dtype for p in model.parameters()} == {dtype}
    assert torch.equal(logits(model, input_ids), logits(load(place / "both", dtype=dtype), input_ids))


def test_a_rounded_model_that_was_changed_is_another_anchor(place):
    model = load(place / "math", dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(AnchorMismatchError, match=r"lm_head\.weight"):
        model.add_expert(place / "package-code")


def test_an_expert_of_another_anchor_is_refused_and_nothing_changes(place, tmp_path, input_ids):
    other = consortium(tmp_path / "other", names=("poems",), vocab_size=101)
    model = load(place / "math")
    before = logits(model, input_ids)
    with pytest.raises(AnchorMismatchError, match="vocab_size"):
        model.add_expert(other.packages["poems"])
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    with pytest.raises(AnchorMismatchError, match=r"model\.norm\.weight"):
        model.add_expert(place / "package-code")
    with torch.no_grad():
        model.model.norm.weight[0] -= 1

    assert model.expert_names == model.config.expert_names == ["public", "math"]
    torch.testing.assert_close(logits(model, input_ids), before)


def test_without_the_public_expert_its_files_tell_the_anchor(place, input_ids):
    model = load(place / "both", "math")
    model.load_expert("code")
    lone = load(place / "math", "math")
    lone.add_expert(place / "package-code")
    assert torch.equal(logits(lone, input_ids), logits(model, input_ids))
    lone.source = None
    with pytest.raises(ConfigurationError, match="load_expert"):
        lone.add_expert(place / "package-code", "again")


def test_biases_come_with_the_expert(tmp_path, input_ids):
    owners = consortium(tmp_path, router_bias=("code",))
    merge_experts(owners.anchor, owners.packages, tmp_path / "both")
    merge_experts(owners.anchor, {"math": owners.packages["math"]}, tmp_path / "one")
    model = load(tmp_path / "one")
    model.add_expert(owners.packages["code"])
    assert model.config.router_bias
    assert torch.equal(logits(model, input_ids), logits(load(tmp_path / "both"), input_ids))
    model.remove_expert("code")
    assert torch.equal(logits(model, input_ids), logits(load(tmp_path / "both", "public", "math"), input_ids))


def test_a_changed_model_is_saved_as_it_is(place, tmp_path, input_ids):
    model = load(place / "both")
    model.remove_expert("math")
    model.add_expert(place / "package-math", "sums")
    model.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")

    assert saved.expert_names == ["public", "code", "sums"]
    assert torch.equal(logits(saved, input_ids), logits(model, input_ids))


def test_an_added_expert_can_be_trained_and_packed(place, input_ids):
    model = load(place / "math")
    model.add_expert(place / "package-code")
    freeze_except(model, "code")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = logits(model, input_ids)
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    with pytest.raises(ConfigurationError, match="unfreeze"):
        model.remove_expert("math")
    with pytest.raises(ConfigurationError, match="unfreeze"):
        model.add_expert(place / "package-math", "again")
    unfreeze(model)
    assert not torch.equal(logits(model, input_ids), before)
    ExpertPackage.from_model(model, "code")


def test_a_name_that_comes_back_with_other_weights_does_not_continue_old_caches(place, input_ids):
    model = load(place / "both")
    cache = DynamicCache()
    model(input_ids, past_key_values=cache)
    model.remove_expert("code")
    model.add_expert(place / "package-math", "code")
    with pytest.raises(ForeignCacheError):
        model(input_ids[:, :1], past_key_values=cache)


def test_adding_keeps_the_caches_of_others(place, input_ids):
    model = load(place / "math")
    cache = DynamicCache()
    model(input_ids, past_key_values=cache, active_experts=["public"])
    model.add_expert(place / "package-code")
    model(input_ids[:, :1], past_key_values=cache, active_experts=["public"])


@pytest.mark.parametrize(
    "change",
    [lambda m, p: m.remove_expert("public"), lambda m, p: m.add_expert(p / "package-code")],
    ids=["go", "come"],
)
def test_a_running_generation_ends_when_an_expert_comes_or_goes(place, input_ids, change):
    model = load(place / "math")

    class Meddler:
        def put(self, value):
            if value.dim() == 1 and not hasattr(self, "done"):
                self.done = change(model, place) or True

        def end(self):
            pass

    with pytest.raises(ExpertsChangedError, match="Start the call again"):
        model.generate(input_ids[:1], active_experts=["math"], max_new_tokens=6, do_sample=False, streamer=Meddler())
    model.generate(input_ids[:1], active_experts=["math"], max_new_tokens=2, do_sample=False)


def test_a_forward_during_which_an_expert_goes_gives_no_result(place, input_ids):
    model = load(place / "both")
    handle = model.model.layers[1].register_forward_hook(lambda *_: model.remove_expert("math"))
    with pytest.raises(ExpertsChangedError):
        model(input_ids, active_experts=["public", "code"])
    handle.remove()
    assert model(input_ids).logits.isfinite().all()


def test_a_selection_belongs_to_one_state_of_one_model(place, input_ids):
    model, other = load(place / "both"), load(place / "both")
    selection = model.select_experts(["public"])
    model(input_ids, active_experts=selection)
    with pytest.raises(ExpertsChangedError):
        other(input_ids, active_experts=selection)
    model.remove_expert("code")
    with pytest.raises(ExpertsChangedError):
        model(input_ids, active_experts=selection)


@pytest.mark.parametrize(
    ("act", "kind", "says"),
    [
        (lambda m, p: m.add_expert(p / "package-math"), DuplicateExpertError, "math"),
        (lambda m, p: m.add_expert(p / "package-code", "Math"), DuplicateExpertError, "Math"),
        (lambda m, p: m.add_expert(p / "package-code", "a/b"), InvalidExpertNameError, "a/b"),
        (lambda m, p: m.add_expert(p / "nothing"), NotAPackageError, "nothing"),
        (lambda m, p: m.add_expert(p / "code"), NotAPackageError, "code"),
        (lambda m, p: m.remove_expert("code"), UnknownExpertError, "code"),
        (lambda m, p: m.remove_expert("mat"), UnknownExpertError, "Did you mean 'math'"),
        (lambda m, p: m.load_expert("math"), ConfigurationError, "in memory already"),
        (lambda m, p: m.load_expert("code"), UnknownExpertError, "code"),
        (lambda m, p: [m.remove_expert(n) for n in ("public", "math")], EmptyExpertSetError, "empty"),
        (
            lambda m, p: m.set_active_experts(["math"]) or m.remove_expert("math"),
            ConfigurationError,
            "another set first",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_and_changes_nothing(place, input_ids, act, kind, says):
    model = load(place / "math")
    with pytest.raises(kind, match=says):
        act(model, place)
    assert model(input_ids).logits.isfinite().all()
    assert "code" not in model.config.expert_names


def test_a_checkpoint_that_changed_on_disk_is_noticed(place):
    model = load(place / "both", "public")
    file = place / "both/model-expert-code-00001-of-00001.safetensors"
    edit_weights(file, lambda tensors: tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight"))
    with pytest.raises(IncompleteCheckpointError, match=r"layers\.1\.mlp\.experts\.2\.up_proj"):
        model.load_expert("code")
    assert model.expert_names == ["public"]


def test_no_call_begins_or_ends_while_layers_change_one_after_the_other(place, input_ids):
    model = load(place / "both")
    model.set_active_experts(["math", "code"])
    mixture = model.mixtures[0]
    original, seen = mixture.repack, []

    def meanwhile():
        original()
        with pytest.raises(ExpertsChangedError):
            model(input_ids)
        seen.append(1)

    mixture.repack = meanwhile
    model.remove_expert("public")
    del mixture.repack
    assert seen
    assert model(input_ids).logits.isfinite().all()


def test_a_package_that_cannot_be_inserted_changes_nothing(place, input_ids, monkeypatch):
    model = load(place / "math")
    before = logits(model, input_ids)

    def fail(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr("flexolmo_hf.modeling.live.FlexOlmoExpert", fail)
    with pytest.raises(MemoryError):
        model.add_expert(place / "package-code")
    assert model.config.expert_names == ["public", "math"]
    assert torch.equal(logits(model, input_ids), before)


def test_an_added_expert_comes_back_from_its_folder_wherever_the_process_stands(
    place, tmp_path, monkeypatch, input_ids
):
    monkeypatch.chdir(place)
    model = load(place / "math")
    model.add_expert("package-code")
    want = logits(model, input_ids)
    model.remove_expert("code")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.load_expert("code")
    assert torch.equal(logits(model, input_ids), want)


def test_an_expert_without_bias_is_loaded_beside_one_that_brought_its_own(tmp_path, input_ids):
    owners = consortium(tmp_path, router_bias=("code",))
    merge_experts(owners.anchor, {"math": owners.packages["math"]}, tmp_path / "one")
    model = load(tmp_path / "one", "public")
    model.add_expert(owners.packages["code"])
    model.load_expert("math")
    assert model.expert_names == ["public", "math", "code"]
    assert all(mixture.gate.bias[1] == 0 for mixture in model.mixtures)


def test_an_expert_removed_inside_a_with_block_does_not_come_back(place):
    model = load(place / "both")
    with model.use_experts("public"):
        model.remove_expert("code")
    assert model.active_experts == ["public", "math"]


def test_a_set_of_which_nothing_is_left_does_not_become_all_experts(place):
    model = load(place / "both")
    model.set_active_experts(["math"])
    with model.use_experts("code"):
        model.remove_expert("math")
    assert model.active_experts == ["code"]
