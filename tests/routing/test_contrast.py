"""Contrast rows tell an owner's tokens from public ones, layer by layer, in what the routers see."""

import pytest
import torch

from flexolmo_hf import FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, NonFiniteTensorError, RouterProjectionError
from flexolmo_hf.routing.contrast import contrast_embedding
from flexolmo_hf.routing.domain_embedding import domain_embedding
from flexolmo_hf.routing.hidden_states import HiddenStates
from tests.conftest import TINY, byte_tokenizer, dense_model

pytest.importorskip("sklearn")

OWN = ["12 + 34 = 46; 5 * 6 = 30", "7 - 2 = 5 and 90 / 3 = 30"] * 4
PUBLIC = ["the river runs by the old town", "she sang of hills and of rain"] * 4


@pytest.fixture
def anchor():
    return dense_model(vocab_size=258)


def contrast(anchor, own=OWN, public=PUBLIC, **options):
    return contrast_embedding(own, public, model=anchor, tokenizer=byte_tokenizer(), **options)


def scores(row, anchor, texts):
    states_NLH = HiddenStates(anchor, byte_tokenizer(), per_layer=True).of_tokens(texts)
    return torch.einsum("nlh,lh->nl", states_NLH, row.vector)


def test_scores_are_log_odds_that_are_right_for_most_tokens_of_new_texts(anchor):
    row = contrast(anchor, freedom=1.0)

    assert row.vector.shape == (TINY["num_hidden_layers"], TINY["hidden_size"])
    assert ((scores(row, anchor, ["81 / 9 = 9; 4 + 4 = 8"]) > 0).float().mean(0) > 0.7).all()
    assert ((scores(row, anchor, ["an old song of the town"]) < 0).float().mean(0) > 0.7).all()


@pytest.mark.parametrize("freedom", [0.003, 0.03])
def test_a_row_is_where_the_penalised_loss_of_both_kinds_weighed_alike_is_least(anchor, freedom):
    public = PUBLIC * 3
    row = contrast(anchor, public=public, freedom=freedom)
    states = [HiddenStates(anchor, byte_tokenizer(), per_layer=True).of_tokens(texts) for texts in (OWN, public)]

    pull_LH = 0
    for sign, states_NLH in zip((1, -1), states, strict=True):
        pull_NL = sign * torch.sigmoid(-sign * torch.einsum("nlh,lh->nl", states_NLH, row.vector))
        pull_LH += torch.einsum("nl,nlh->lh", pull_NL, states_NLH) / len(states_NLH)

    # There is no intercept: at the minimum, the tokens pull as much as the penalty does.
    tokens = sum(map(len, states))
    torch.testing.assert_close(row.vector, freedom * tokens / 2 * pull_LH, atol=0.01, rtol=0)


def test_swapping_the_kinds_swaps_the_sign(anchor):
    one, other = contrast(anchor), contrast(anchor, own=PUBLIC, public=OWN)

    torch.testing.assert_close(one.vector, -other.vector, atol=1e-3, rtol=1e-2)


def test_states_of_tokens_are_what_the_mean_is_taken_of(anchor):
    encode = HiddenStates(anchor, byte_tokenizer(), per_layer=True)

    states_NLH = encode.of_tokens(["one text", "another"])

    assert states_NLH.shape[0] == len("one text") + len("another")
    torch.testing.assert_close(states_NLH[: len("one text")].mean(0), encode(["one text"])[0])


def test_the_row_is_what_the_router_starts_with_and_the_public_row_is_zero(anchor, tmp_path):
    anchor.save_pretrained(tmp_path / "anchor")
    row = contrast(anchor)

    model = FlexOlmoForCausalLM.from_dense(tmp_path / "anchor", expert="math", router_embeddings={"math": row})

    for layer, mixture in enumerate(model.mixtures):
        assert torch.equal(mixture.gate.weight[1], row.vector[layer])
        assert not mixture.gate.weight[0].any()


def test_rows_of_another_kind_are_refused_beside_it(anchor, tmp_path):
    anchor.save_pretrained(tmp_path / "anchor")
    rows = {
        "public": domain_embedding(PUBLIC, encoder="self", model=anchor, tokenizer=byte_tokenizer(), per_layer=True),
        "math": contrast(anchor),
    }

    with pytest.raises(RouterProjectionError):
        FlexOlmoForCausalLM.from_dense(tmp_path / "anchor", expert="math", router_embeddings=rows)


def test_documents_are_counted_that_were_read_and_no_more_tokens_are_kept_than_asked_for(anchor, monkeypatch):
    learned = []
    monkeypatch.setattr(
        "flexolmo_hf.routing.contrast._weights",
        lambda own, public, freedom: learned.append((len(own), len(public))) or own[0],
    )
    row = contrast(anchor, own=[f"{number:02}" for number in range(40)], tokens=50)

    # Read sixteen at a time, of two tokens each.
    assert row.documents == 32
    assert set(learned) == {(50, 50)}


def test_another_seed_reads_another_sample(anchor):
    one, again, other = (contrast(anchor, own=OWN[:2] + PUBLIC, sample=2, seed=seed).vector for seed in (0, 0, 1))

    assert torch.equal(one, again)
    assert not torch.allclose(one, other, atol=1e-3)


def test_states_that_are_no_numbers_are_refused(anchor):
    with torch.no_grad():
        anchor.model.layers[0].self_attn.o_proj.weight.fill_(float("nan"))

    with pytest.raises(NonFiniteTensorError, match="the owner's documents"):
        contrast(anchor)


@pytest.mark.parametrize("own, public", [([" "], PUBLIC), (OWN, [])])
def test_a_kind_without_text_is_refused(anchor, own, public):
    with pytest.raises(ConfigurationError, match="There is no text"):
        contrast(anchor, own, public)


@pytest.mark.parametrize("options", [{"tokens": 0}, {"freedom": 0.0}])
def test_settings_that_teach_nothing_are_refused(anchor, options):
    with pytest.raises(ConfigurationError, match="above 0"):
        contrast(anchor, **options)
