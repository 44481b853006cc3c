"""Dense models as experts: every tensor is where it belongs, and every average is the one computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import (
    AnchorMismatchError,
    ConfigurationError,
    DuplicateExpertError,
    EmptyExpertSetError,
    NotOlmo2Error,
    OutputFolderNotEmptyError,
    UnknownExpertError,
)
from flexolmo_hf.evaluation.baselines.btx import build_btx
from flexolmo_hf.evaluation.baselines.no_coordination import build_no_coordination
from flexolmo_hf.modeling.embedded_row import EmbeddedRow, RouterProjection
from tests.conftest import TINY, dense_model
from tests.evaluation.baselines.owners import dense_owners

BOTH = pytest.mark.parametrize("build", [build_btx, build_no_coordination])
IDS = torch.arange(2, 24).view(2, 11)


def logits(path, **options):
    with torch.no_grad():
        return FlexOlmoForCausalLM.from_pretrained(path, **options)(IDS).logits


def by_hand(owners, names, shared, rows, ids):
    """Run the mixture as the formulas say: the shared tensors given, every network, and a softmax over the rows."""
    reference = dense_model(vocab_size=len(owners.tokenizer))
    reference.load_state_dict(shared)
    networks = [[layer.mlp for layer in owners.models[name].model.layers] for name in names]
    for number, layer in enumerate(reference.model.layers):
        matrix = torch.stack([rows[name] for name in names])
        experts = [network[number] for network in networks]

        def mixed(hidden, matrix=matrix, experts=experts):
            weights = F.linear(hidden, matrix).softmax(-1)
            return sum(weights[..., [at]] * expert(hidden) for at, expert in enumerate(experts))

        layer.mlp.forward = mixed
    with torch.no_grad():
        return reference(ids).logits


@pytest.fixture
def rows():
    return {name: torch.randn(TINY["hidden_size"]) * 0.1 for name in ("public", "math", "code")}


def test_btx_computes_the_mixture_of_the_networks_over_the_mean_of_all_else(tmp_path, rows):
    owners = dense_owners(tmp_path, "math", "code")
    states = [model.state_dict() for model in owners.models.values()]
    mean = {key: sum(state[key] for state in states) / 3 for key in states[0]}
    build_btx(owners.anchor, owners.experts, tmp_path / "btx", router_embeddings=rows)

    expected = by_hand(owners, ["public", "math", "code"], mean, rows, IDS)
    torch.testing.assert_close(logits(tmp_path / "btx"), expected, atol=1e-5, rtol=1e-5)


def test_without_coordination_the_networks_stand_in_the_anchor(tmp_path, rows):
    owners = dense_owners(tmp_path, "math", "code")
    build_no_coordination(owners.anchor, owners.experts, tmp_path / "plugged", router_embeddings=rows)

    expected = by_hand(owners, ["public", "math", "code"], owners.models["public"].state_dict(), rows, IDS)
    torch.testing.assert_close(logits(tmp_path / "plugged"), expected, atol=1e-5, rtol=1e-5)


def test_btx_before_training_equals_no_coordination_where_the_shared_weights_are_equal(tmp_path):
    owners = dense_owners(tmp_path, "math", "code")
    for name in ("math", "code"):
        state = {key: value for key, value in owners.models["public"].state_dict().items() if ".mlp." not in key}
        owners.models[name].load_state_dict(state, strict=False)
        owners.models[name].save_pretrained(owners.experts[name])
    build_btx(owners.anchor, owners.experts, tmp_path / "btx")
    build_no_coordination(owners.anchor, owners.experts, tmp_path / "plugged")

    assert torch.equal(logits(tmp_path / "btx"), logits(tmp_path / "plugged"))


def test_btx_differs_from_no_coordination_where_they_are_not(tmp_path):
    owners = dense_owners(tmp_path, "math")
    build_btx(owners.anchor, owners.experts, tmp_path / "btx")
    build_no_coordination(owners.anchor, owners.experts, tmp_path / "plugged")

    assert not torch.allclose(logits(tmp_path / "btx"), logits(tmp_path / "plugged"), atol=1e-3)


def test_public_alone_is_the_anchor_where_nothing_was_averaged(tmp_path):
    owners = dense_owners(tmp_path, "math")
    build_no_coordination(owners.anchor, owners.experts, tmp_path / "plugged")
    with torch.no_grad():
        expected = owners.models["public"](IDS).logits

    torch.testing.assert_close(logits(tmp_path / "plugged", active_experts=["public"]), expected, atol=1e-5, rtol=1e-5)


@BOTH
def test_result_loads_whole_with_names_and_tokenizer(tmp_path, build):
    owners = dense_owners(tmp_path, "math", "code")
    out = build(owners.anchor, owners.experts, tmp_path / "out")
    model, report = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)

    assert model.expert_names == ["public", "math", "code"]
    assert model.config.num_experts_per_tok == 3
    assert model.config.shared_averaged == (build is build_btx)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (out / "tokenizer.json").is_file()
    assert (out / "model-expert-math-00001-of-00001.safetensors").is_file()


@BOTH
def test_random_rows_are_drawn_by_name_and_seed(tmp_path, build):
    owners = dense_owners(tmp_path, "math", "code")
    build(owners.anchor, owners.experts, tmp_path / "both")
    build(owners.anchor, {"math": owners.experts["math"]}, tmp_path / "one")
    build(owners.anchor, owners.experts, tmp_path / "other seed", seed=1)
    both, one, other = (
        FlexOlmoForCausalLM.from_pretrained(tmp_path / name).mixtures[0].gate.weight
        for name in ("both", "one", "other seed")
    )

    assert torch.equal(both[:2], one)
    assert not torch.allclose(both[0], both[1])
    assert not torch.allclose(both, other)
    assert 0.01 < both.std() < 0.04


def test_rows_that_were_made_from_text_are_put_in_place_and_remembered(tmp_path, rows):
    owners = dense_owners(tmp_path, "math")
    projection = RouterProjection(384, 7, "owner/encoder")
    embedded = {name: EmbeddedRow(rows[name], projection) for name in ("public", "math")}
    build_no_coordination(owners.anchor, owners.experts, tmp_path / "out", router_embeddings=embedded)
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path / "out")

    assert model.config.router_projection == projection.record()
    for mixture in model.mixtures:
        assert torch.equal(mixture.gate.weight, torch.stack([rows["public"], rows["math"]]))


def test_tied_embeddings_stay_tied(tmp_path):
    owners = dense_owners(tmp_path, "math", tie_word_embeddings=True)
    build_btx(owners.anchor, owners.experts, tmp_path / "btx")
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path / "btx")
    mean = sum(one.model.embed_tokens.weight for one in owners.models.values()) / 2

    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model.lm_head.weight, mean)


def test_half_precision_is_averaged_in_full(tmp_path):
    owners = dense_owners(tmp_path, "math", "code")
    for name, path in {"public": owners.anchor, **owners.experts}.items():
        owners.models[name].to(torch.bfloat16).save_pretrained(path)
    build_btx(owners.anchor, owners.experts, tmp_path / "btx")
    model = FlexOlmoForCausalLM.from_pretrained(tmp_path / "btx", dtype="auto")
    norms = [one.model.norm.weight.float() for one in owners.models.values()]

    assert model.dtype == torch.bfloat16
    assert torch.equal(model.model.norm.weight, (sum(norms) / 3).bfloat16())


@BOTH
def test_wrong_parts_are_refused_before_anything_is_written(tmp_path, build, refused):
    owners = dense_owners(tmp_path, "math")
    dense_model(vocab_size=len(owners.tokenizer), intermediate_size=32).save_pretrained(tmp_path / "narrow")
    build(owners.anchor, owners.experts, tmp_path / "mixture")
    out = tmp_path / "out"

    with refused(AnchorMismatchError, "'code'", "intermediate_size 32 instead of 48"):
        build(owners.anchor, {"code": tmp_path / "narrow"}, out)
    with refused(NotOlmo2Error, "flex_olmo"):
        build(owners.anchor, {"code": tmp_path / "mixture"}, out)
    with refused(EmptyExpertSetError):
        build(owners.anchor, {}, out)
    with refused(DuplicateExpertError, "public"):
        build(owners.anchor, {"public": owners.experts["math"]}, out)
    with refused(UnknownExpertError, "cod"):
        build(owners.anchor, owners.experts, out, router_embeddings={"cod": torch.ones(TINY["hidden_size"])})
    with refused(ConfigurationError, "(3,)"):
        build(owners.anchor, owners.experts, out, router_embeddings={"math": torch.ones(3)})
    with refused(ConfigurationError, "experts_per_token is 3"):
        build(owners.anchor, owners.experts, out, experts_per_token=3)
    with refused(OutputFolderNotEmptyError):
        build(owners.anchor, owners.experts, tmp_path / "mixture")
    owners.tokenizer.add_tokens("new")
    owners.tokenizer.save_pretrained(owners.experts["math"])
    with refused(ConfigurationError, "'math'", "tokenizer"):
        build(owners.anchor, owners.experts, out)
