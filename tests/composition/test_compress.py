"""Compressing, narrowing and materialising: what is kept is what is said, and every way to a model gives the same."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers.models.flex_olmo import FlexOlmoForCausalLM as StockModel

from flexolmo_hf import (
    ExpertPackage,
    FlexOlmoForCausalLM,
    export_checkpoint,
    freeze_except,
    inspect_checkpoint,
    merge_experts,
    unfreeze,
)
from flexolmo_hf.composition.compress import low_rank_factors, to_low_rank
from flexolmo_hf.composition.manifest import Manifest
from flexolmo_hf.errors import (
    AnchorMismatchError,
    ConfigurationError,
    DamagedFileError,
    ExpertNotLoadedError,
    NotAPackageError,
)
from flexolmo_hf.modeling.expert import MATRICES
from flexolmo_hf.modeling.files.layout import Deferred, write_weights
from flexolmo_hf.modeling.low_rank import LowRankExpert
from tests.composition.conftest import consortium, edit_json, forged, logits
from tests.conftest import dense_model
from tests.trainers.test_freezing import state

FULL_RANK = 48
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def owner(one_owner):
    """The owner of math, with the package read."""
    one_owner.package = ExpertPackage.from_pretrained(one_owner.packages["math"])
    return one_owner


def saved(package, folder):
    package.save_pretrained(folder)
    return folder


def merged(owner, folder, **packages):
    merge_experts(owner.anchor, packages, folder)
    return FlexOlmoForCausalLM.from_pretrained(folder)


def ways(owner):
    """Give the math expert in each form."""
    return {
        "low rank": owner.package.compress(5, anchor=owner.anchor),
        "narrow": owner.package.narrow(20),
        "full": owner.package,
    }


FORMS = pytest.mark.parametrize("form", ["low rank", "narrow", "full"])


@FORMS
def test_merged_as_it_is_or_with_full_matrices_is_the_same_model(owner, tmp_path, input_ids, form):
    package = ways(owner)[form]
    small = merged(owner, tmp_path / "small", math=package)
    whole = merged(owner, tmp_path / "whole", math=package.materialise(owner.anchor))

    assert small.config.expert_forms == ({"math": package.manifest.form} if package.manifest.form else {})
    assert whole.config.expert_forms == {}
    torch.testing.assert_close(logits(small, input_ids), logits(whole, input_ids), **CLOSE)


@pytest.mark.parametrize("rank", [FULL_RANK, 10_000])
def test_full_rank_is_the_original_to_rounding(owner, tmp_path, input_ids, rank):
    package = owner.package.compress(rank, anchor=owner.anchor)
    again = package.materialise(owner.anchor)
    small, original = merged(owner, tmp_path / "small", math=package), merged(owner, tmp_path / "o", math=owner.package)

    assert package.manifest.form == {"rank": FULL_RANK}
    assert package.manifest.training["compression"]["energy kept, lowest matrix"] == 1.0
    for key, tensor in owner.package.tensors.items():
        torch.testing.assert_close(again.tensors[key], tensor, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logits(small, input_ids), logits(original, input_ids), **CLOSE)


@FORMS
def test_added_to_a_live_model_is_merged_bit_for_bit(owner, tmp_path, input_ids, form):
    owners = consortium(tmp_path / "more", ["math", "code"])
    package = saved(ways(owner)[form], tmp_path / "package")
    both = merged(owners, tmp_path / "both", code=owners.packages["code"], math=package)
    live = merged(owners, tmp_path / "one", code=owners.packages["code"])
    live.add_expert(package)

    assert live.config.expert_forms == both.config.expert_forms
    assert torch.equal(logits(live, input_ids), logits(both, input_ids))
    live.remove_expert("math")
    live.load_expert("math")
    assert torch.equal(logits(live, input_ids), logits(both, input_ids))


@pytest.mark.parametrize("form", ["low rank", "narrow"])
def test_a_packed_model_takes_it_in_unpacked(owner, tmp_path, input_ids, form):
    live = owner.models["math"]
    live.remove_expert("math")
    before = logits(live, input_ids)
    live.pack_experts()
    live.add_expert(ways(owner)[form])
    assert all(mixture.packed is None for mixture in live.mixtures)
    assert torch.equal(
        logits(live, input_ids), logits(merged(owner, tmp_path / "m", math=ways(owner)[form]), input_ids)
    )

    live.remove_expert("math")
    live.pack_experts()
    assert torch.equal(logits(live, input_ids), before)


def test_experts_of_different_rank_and_width_live_in_one_model(owner, tmp_path, input_ids):
    owners = consortium(tmp_path / "more", ["math", "code", "news"])
    packages = {name: ExpertPackage.from_pretrained(folder) for name, folder in owners.packages.items()}
    parts = {
        "math": packages["math"].compress(3, anchor=owners.anchor),
        "code": packages["code"].compress(9, anchor=owners.anchor),
        "news": packages["news"].narrow(16),
    }
    small = merged(owners, tmp_path / "small", **parts)
    whole = merged(owners, tmp_path / "whole", **{n: p.materialise(owners.anchor) for n, p in parts.items()})

    for kept in (None, ["math"], ["public", "code", "news"], [["math"], ["public", "news"], ["code", "public"]]):
        with torch.no_grad():
            one, other = (m(input_ids, active_experts=kept).logits for m in (small, whole))
        torch.testing.assert_close(one, other, **CLOSE)


def test_a_merged_checkpoint_is_an_anchor_with_its_forms(owner, tmp_path, input_ids):
    owners = consortium(tmp_path / "more", ["math", "code"])
    small = ExpertPackage.from_pretrained(owners.packages["math"]).compress(4, anchor=owners.anchor)
    merge_experts(owners.anchor, {"math": small}, tmp_path / "one")
    merge_experts(tmp_path / "one", {"code": owners.packages["code"]}, tmp_path / "both")
    at_once = merged(owners, tmp_path / "at once", math=small, code=owners.packages["code"])

    both = FlexOlmoForCausalLM.from_pretrained(tmp_path / "both")
    assert torch.equal(logits(both, input_ids), logits(at_once, input_ids))


@pytest.mark.parametrize("matrix", MATRICES)
def test_no_matrix_of_its_rank_is_nearer(owner, matrix):
    public = owner.models["math"].expert_modules("public")[0].get_parameter(matrix)
    difference = (owner.package.tensors[f"layers.0.{matrix}"] - public).detach().double()
    first, second = low_rank_factors(difference, 5)
    lost = torch.linalg.svdvals(difference)[5:].square().sum()

    assert (first.shape, second.shape) == ((5, difference.shape[1]), (difference.shape[0], 5))
    torch.testing.assert_close((difference - second @ first).square().sum(), lost)
    torch.testing.assert_close(first.norm(dim=1), second.norm(dim=0))


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.99, 1.0])
def test_the_smallest_rank_that_keeps_the_energy_is_taken(owner, energy):
    package = owner.package.compress(energy=energy, anchor=owner.anchor)
    rank = package.manifest.form["rank"]
    below = owner.package.compress(max(1, rank - 1), anchor=owner.anchor)

    assert package.manifest.training["compression"]["energy kept, lowest matrix"] >= energy - 1e-6
    assert rank == 1 or below.manifest.training["compression"]["energy kept, lowest matrix"] < energy
    assert 1 < rank <= FULL_RANK


def test_without_rank_or_energy_nearly_all_is_kept(owner):
    assert (
        owner.package.compress(anchor=owner.anchor).manifest
        == owner.package.compress(energy=0.99, anchor=owner.anchor).manifest
    )


def test_a_difference_of_low_rank_is_found_whole(tmp_path, input_ids, owner):
    small = owner.package.compress(4, anchor=owner.anchor)
    again = small.materialise(owner.anchor).compress(energy=1 - 1e-6, anchor=owner.anchor)

    assert again.manifest.form == {"rank": 4}


def test_an_expert_that_equals_the_public_one_has_nothing_to_lose(owner):
    fresh = FlexOlmoForCausalLM.from_dense(owner.anchor, expert="math")
    package = ExpertPackage.from_model(fresh, "math").compress(anchor=owner.anchor)

    assert package.manifest.form == {"rank": 1}
    assert package.manifest.training["compression"]["energy kept, mean"] == 1.0
    full = package.materialise(owner.anchor)
    assert all(
        torch.equal(full.tensors[f"layers.0.{m}"], fresh.expert_modules("math")[0].get_parameter(m)) for m in MATRICES
    )


def test_the_manifest_says_what_was_done_and_drops_what_was_measured_before(owner, tmp_path):
    packed = ExpertPackage.from_model(owner.models["math"], "math", training={"steps": 7}, evaluation={"bpb": 1.5})
    package = packed.compress(6, anchor=owner.anchor)
    record = package.manifest.training.pop("compression")

    assert package.manifest.training == {"steps": 7}
    assert package.manifest.evaluation == {}
    sizes = [sum(t.nbytes for t in p.tensors.values()) for p in (packed, package)]
    assert [record["bytes before"], record["bytes after"]] == sizes
    assert sizes[1] < sizes[0] / 2
    assert 0 < record["energy kept, lowest matrix"] <= record["energy kept, mean"] < 1


def test_a_rank_that_saves_nothing_is_warned_of(owner, caplog):
    owner.package.compress(FULL_RANK, anchor=owner.anchor)

    assert "no smaller" in caplog.text


def test_narrowing_keeps_the_neurons_with_the_largest_weights_in_their_order(owner):
    tensors = {key: tensor.clone() for key, tensor in owner.package.tensors.items()}
    kept = torch.tensor([3, 4, 11, 30, 47])
    for layer in range(2):
        tensors[f"layers.{layer}.up_proj.weight"][kept] *= 100
    package = ExpertPackage(owner.package.manifest, tensors).narrow(5)

    for layer in range(2):
        gate, up, down = (tensors[f"layers.{layer}.{matrix}"] for matrix in MATRICES)
        for matrix, part in zip(MATRICES, (gate[kept], up[kept], down[:, kept]), strict=True):
            assert torch.equal(package.tensors[f"layers.{layer}.{matrix}"], part)
    assert package.manifest.training["narrowing"]["norms kept, lowest layer"] > 0.8


def test_neurons_of_zeros_are_lost_without_a_trace(owner, tmp_path, input_ids):
    tensors = {key: tensor.clone() for key, tensor in owner.package.tensors.items()}
    for layer in range(2):
        tensors[f"layers.{layer}.down_proj.weight"][:, ::2] = 0
    whole = ExpertPackage(owner.package.manifest, tensors)
    models = [merged(owner, tmp_path / str(n), math=p) for n, p in enumerate((whole, whole.narrow(24)))]

    torch.testing.assert_close(*(logits(model, input_ids) for model in models), **CLOSE)


@FORMS
def test_stock_transformers_computes_the_export_the_same(owner, tmp_path, input_ids, form):
    model = merged(owner, tmp_path / "model", math=ways(owner)[form])
    for kept in (["public", "math"], ["math"]):
        out = export_checkpoint(tmp_path / "model", tmp_path / "+".join(kept), active_experts=kept)
        stock, report = StockModel.from_pretrained(out, output_loading_info=True)
        model.set_active_experts(kept)

        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert "expert_forms" not in json.loads((out / "config.json").read_text())
        torch.testing.assert_close(logits(stock, input_ids), logits(model, input_ids), **CLOSE)


def test_full_matrices_are_made_one_file_at_a_time(tmp_path):
    alive, most = [], []

    def make(number):
        alive.append(number)
        most.append(len(list(tmp_path.glob("*.safetensors"))))
        return torch.full((8,), float(number))

    like = torch.empty(8, device="meta")
    keys = [f"model.layers.{n}.mlp.experts.0.up_proj.weight" for n in range(4)]
    made = {key: Deferred(like, lambda n=n: make(n)) for n, key in enumerate(keys)}
    write_weights(tmp_path, made, ["public"], 64, whose="the test")

    assert most == [0, 0, 1, 1]
    files = sorted(tmp_path.glob("*.safetensors"))
    values = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            values |= {key: float(opened.get_tensor(key)[0]) for key in opened.keys()}  # noqa: SIM118 (not a mapping)
    assert values == {key: float(n) for n, key in enumerate(keys)}


@FORMS
def test_what_is_read_is_what_was_made_and_its_card_and_table_say_the_form(owner, tmp_path, form):
    package = ways(owner)[form]
    folder = saved(package, tmp_path / "package")
    read = ExpertPackage.from_pretrained(folder)
    words = {"low rank": "rank 5", "narrow": "width 20", "full": "full"}[form]

    assert read.manifest.form == package.manifest.form
    assert read.manifest.training == package.manifest.training
    assert all(torch.equal(read.tensors[key], package.tensors[key]) for key in package.tensors)
    assert [expert.form for expert in inspect_checkpoint(folder).experts] == [words]
    merge_experts(owner.anchor, {"math": folder}, tmp_path / "merged")
    assert [expert.form for expert in inspect_checkpoint(tmp_path / "merged").experts] == ["full", words]
    for card in (folder / "README.md", tmp_path / "merged" / "README.md"):
        assert (f"math ({words})" in card.read_text()) == (form != "full")
    stock_loads = "stock Transformers loads the same files" in (tmp_path / "merged" / "README.md").read_text()
    assert stock_loads == (form == "full")


def test_the_manifest_of_a_full_expert_is_as_before_there_were_forms(owner):
    assert "form" not in json.loads((owner.packages["math"] / "manifest.json").read_text())


def test_a_forged_form_is_refused(owner, tmp_path):
    folder = saved(owner.package.compress(5, anchor=owner.anchor), tmp_path / "package")
    with pytest.raises(DamagedFileError, match="one expert of its anchor"):
        ExpertPackage.from_pretrained(forged(folder, form={"rank": 6}))
    with pytest.raises(DamagedFileError, match="one expert of its anchor"):
        ExpertPackage.from_pretrained(forged(folder, form={}))
    with pytest.raises(NotAPackageError, match="form"):
        ExpertPackage.from_pretrained(forged(folder, form={"rank": -5}))
    edit_json(folder / "manifest.json", lambda content: content.update(form="rank 5"))
    with pytest.raises(NotAPackageError):
        Manifest.read(folder)


def test_another_anchor_is_refused(owner, tmp_path):
    torch.manual_seed(7)
    other = dense_model()
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AnchorMismatchError):
        owner.package.compress(4, anchor=tmp_path / "other")
    small = owner.package.compress(4, anchor=owner.anchor)
    with pytest.raises(AnchorMismatchError):
        small.materialise(tmp_path / "other")
    with pytest.raises(AnchorMismatchError):
        merge_experts(tmp_path / "other", {"math": small}, tmp_path / "out")


REFUSED = {
    "rank and energy": {"rank": 4, "energy": 0.9},
    "no rank": {"rank": 0},
    "no energy": {"energy": 0.0},
    "more than all energy": {"energy": 1.5},
}


@pytest.mark.parametrize("options", REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused(owner, options):
    with pytest.raises(ConfigurationError, match="rank is"):
        owner.package.compress(**options, anchor=owner.anchor)


def test_only_a_full_expert_changes_its_form(owner):
    small, thin = owner.package.compress(4, anchor=owner.anchor), owner.package.narrow(8)
    for package in (small, thin):
        with pytest.raises(ConfigurationError, match="only a full one"):
            package.compress(2, anchor=owner.anchor)
        with pytest.raises(ConfigurationError, match="only a full one"):
            package.narrow(4)
    with pytest.raises(ConfigurationError, match="materialise"):
        small.materialise()
    for width in (0, FULL_RANK):
        with pytest.raises(ConfigurationError, match="width"):
            owner.package.narrow(width)
    assert owner.package.materialise() is owner.package


def lora(owner, rank=4, **options):
    model = FlexOlmoForCausalLM.from_dense(owner.anchor, expert="math", router_bias=True)
    to_low_rank(model, "math", rank, **options)
    return model


def test_a_new_low_rank_expert_changes_nothing_yet(owner, input_ids):
    before = FlexOlmoForCausalLM.from_dense(owner.anchor, expert="math", router_bias=True)
    model = lora(owner)

    assert model.config.expert_forms == {"math": {"rank": 4}}
    assert all(isinstance(module, LowRankExpert) for module in model.expert_modules("math"))
    torch.testing.assert_close(logits(model, input_ids), logits(before, input_ids), **CLOSE)
    for module in model.expert_modules("math"):
        assert module.up_proj.B.weight.count_nonzero() == 0
        assert module.up_proj.A.weight.count_nonzero() > 0


def test_a_seed_decides_the_draw(owner):
    one, same, other = (state(lora(owner, seed=seed)) for seed in (1, 1, 2))

    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_training_moves_the_factors_and_the_row_and_nothing_else(owner, tmp_path, input_ids):
    model = lora(owner)
    names = freeze_except(model, "math")
    assert len(names) == 2 * (6 + 2)
    before = state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(4):
        loss = model(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    after = state(model)

    assert losses[-1] < losses[0]
    for key in before:
        moved = not torch.equal(after[key], before[key])
        assert moved == (".experts.1." in key or ".mlp.gate." in key), key
        if ".mlp.gate." in key:
            assert torch.equal(after[key][0], before[key][0])
    trained = logits(model, input_ids)
    unfreeze(model)
    folder = saved(ExpertPackage.from_model(model, "math"), tmp_path / "package")
    assert ExpertPackage.from_pretrained(folder).manifest.form == {"rank": 4}
    again = merged(owner, tmp_path / "merged", math=folder)
    torch.testing.assert_close(logits(again, input_ids), trained, **CLOSE)
    live = FlexOlmoForCausalLM.from_dense(owner.anchor)
    live.add_expert(folder)
    assert torch.equal(logits(live, input_ids), logits(again, input_ids))


def test_what_was_trained_is_not_thrown_away(owner):
    with pytest.raises(ConfigurationError, match=r"compress\(rank"):
        to_low_rank(owner.models["math"], "math", 4)
    model = lora(owner)
    before = state(model)
    to_low_rank(model, "math", 4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(model).items())
    with pytest.raises(ConfigurationError, match="rank 4"):
        to_low_rank(model, "math", 5)


def test_the_low_rank_form_is_refused_where_it_makes_no_sense(owner, tmp_path):
    fresh = FlexOlmoForCausalLM.from_dense(owner.anchor, expert="math")
    with pytest.raises(ConfigurationError, match="public one"):
        to_low_rank(fresh, "public", 4)
    with pytest.raises(ConfigurationError, match="rank"):
        to_low_rank(fresh, "math", 49)
    fresh.save_pretrained(tmp_path / "fresh")
    alone = FlexOlmoForCausalLM.from_pretrained(tmp_path / "fresh", active_experts=["math"])
    with pytest.raises(ExpertNotLoadedError):
        to_low_rank(alone, "math", 4)
    freeze_except(fresh, "math")
    with pytest.raises(ConfigurationError, match="trained"):
        to_low_rank(fresh, "math", 4)
