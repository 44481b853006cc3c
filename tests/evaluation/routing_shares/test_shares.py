"""Shares are what one computes by hand, whatever the batch, the padding and the order in which texts come."""

import time

import numpy as np
import pytest
import torch

from flexolmo_hf.errors import (
    ConfigurationError,
    DamagedFileError,
    ExpertRowsError,
    NonFiniteTensorError,
    NotFlexOlmoError,
    UnknownExpertError,
)
from flexolmo_hf.evaluation.routing_shares import RoutingShares, routing_shares
from flexolmo_hf.evaluation.routing_shares.batches import batches
from flexolmo_hf.evaluation.routing_shares.tally import Tally, buckets, picked
from tests.conftest import dense_model
from tests.evaluation.routing_shares.conftest import EXPERTS, ROUTED, SWAPPED, known_model
from tests.modeling.test_expert_sets import named_model, poison

TEXTS = {"math": ["mmmc"], "code": ["ccpm", "cccc"]}
SHARES = ("weight", "top1", "picks", "entropy", "agreement", "bucket_tokens", "position")


def mean(layer, text):
    return np.mean([layer[character] for character in text], axis=0)


def assert_same(one, other, tolerance=1e-6):
    for name in SHARES:
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=tolerance, err_msg=name)
    assert (one.tokens, one.documents, one.experts) == (other.tokens, other.documents, other.experts)


def test_weights_are_those_set_by_hand(model, tokenizer):
    found = routing_shares(model, tokenizer, TEXTS)

    assert (found.experts, found.domains, found.public) == (EXPERTS, ["math", "code"], "public")
    assert (found.tokens, found.documents, found.layers) == ([4, 8], [1, 2], 2)
    expected = [[mean(layer, text) for layer in (ROUTED, SWAPPED)] for text in ("mmmc", "ccpmcccc")]
    np.testing.assert_allclose(found.weight, expected, atol=1e-6)


def test_the_strongest_expert_of_each_token_is_counted(model, tokenizer):
    found = routing_shares(model, tokenizer, TEXTS)

    assert found.top1[0].tolist() == [[0, 3 / 4, 1 / 4], [0, 1 / 4, 3 / 4]]
    assert found.top1[1].tolist() == [[1 / 8, 1 / 8, 6 / 8], [1 / 8, 6 / 8, 1 / 8]]


def test_experts_with_equal_weights_share_the_place(model, tokenizer):
    # Of "m", public and code are both second; of "c", public is.
    found = routing_shares(model, tokenizer, TEXTS, top_k=2)

    picks = np.array([[1.5 + 1, 3, 1.5 + 1], [1.5 + 1, 1.5 + 1, 3]]) / 8
    np.testing.assert_allclose(found.picks[0], picks, atol=1e-12)
    assert picked(torch.tensor([[[0.25, 0.5, 0.25]]]), 2).tolist() == [[[0.5, 1.0, 0.5]]]
    assert picked(torch.full((1, 1, 4), 0.25), 1).tolist() == [[[0.25] * 4]]
    assert picked(torch.tensor([[[0.1, 0.2, 0.7]]]), 2).tolist() == [[[0.0, 1.0, 1.0]]]


def test_a_model_that_uses_few_experts_picks_those_it_uses(tokenizer):
    found = routing_shares(known_model(per_token=2), tokenizer, {"code": ["cp"]})

    assert found.top_k == 2
    # Of "c", code and public in the first layer; "p" has a tie, which the model breaks in favour of one.
    assert found.picks[0, 0, 0] == 0.5
    assert sorted(found.picks[0, 0, 1:].tolist()) in ([0.0, 0.5], [0.25, 0.25])
    expected_of_c = np.array([0.25, 0, 0.625]) / 0.875
    expected_of_p = np.array([2, 1]) / 3
    assert found.weight[0, 0, 0] == pytest.approx((expected_of_c[0] + expected_of_p[0]) / 2, abs=1e-6)


def test_entropy_is_that_of_the_weights_in_bits(model, tokenizer):
    found = routing_shares(model, tokenizer, {"public": ["pppp"]})

    np.testing.assert_allclose(found.entropy, [[1.5, 1.5]], atol=1e-6)


def test_layers_agree_on_the_tokens_whose_strongest_expert_is_the_same(model, tokenizer):
    # "p" goes to public in both layers; "m" and "c" change sides.
    found = routing_shares(model, tokenizer, {"mixed": ["ppmc"]})
    agreement, by_chance = found.neighbour_agreement()

    assert found.agreement[0].tolist() == [[1.0, 0.5], [0.5, 1.0]]
    assert agreement.tolist() == [[0.5]]
    assert by_chance.tolist() == [[0.5**2 + 0.25**2 + 0.25**2]]


def test_agreement_is_of_the_layers_it_names(tokenizer):
    model = known_model(orders=((0, 1, 2), (0, 2, 1), (0, 2, 1)))
    found = routing_shares(model, tokenizer, {"mixed": ["ppmc"]})

    assert found.agreement[0].tolist() == [[1.0, 0.5, 0.5], [0.5, 1.0, 1.0], [0.5, 1.0, 1.0]]
    assert found.neighbour_agreement()[0].tolist() == [[0.5, 1.0]]


def test_positions_are_counted_from_the_start_of_the_window(model, tokenizer):
    found = routing_shares(model, tokenizer, {"code": ["mcp" + "c" * 4]}, max_length=8)

    assert found.buckets == [(1, 1), (2, 2), (3, 4), (5, 7)]
    assert found.bucket_tokens.tolist() == [[1, 1, 2, 3]]
    for bucket, text in enumerate(("m", "c", "pc", "ccc")):
        np.testing.assert_allclose(found.position[0, bucket, 0], mean(ROUTED, text), atol=1e-6)


def test_without_a_length_windows_are_those_the_model_has_positions_for(model, tokenizer):
    texts = {"code": ["mcp" * 60]}
    found = routing_shares(model, tokenizer, texts)

    assert found.max_length == 128
    assert found.to_dict() == routing_shares(model, tokenizer, texts, max_length=128).to_dict()


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 8, 9, 10, 1024])
def test_buckets_cover_every_position_once(max_length):
    covered = [position for low, high in buckets(max_length) for position in range(low, high + 1)]

    assert covered == list(range(1, max_length))


def test_a_bucket_without_tokens_has_zeros_and_no_nan(model, tokenizer):
    found = routing_shares(model, tokenizer, {"code": ["c"]}, max_length=64)

    assert np.isfinite(found.position).all()
    assert found.bucket_tokens[0, 1:].tolist() == [0] * 6
    assert not found.position[0, 1:].any()


def test_every_token_is_counted_once_however_long_the_window(tokenizer):
    text = "mcp" * 20
    expected = [mean(ROUTED, text), mean(SWAPPED, text)]
    for max_length in (2, 7, 61, 100):
        found = routing_shares(known_model(), tokenizer, {"all": [text, "", "m"]}, max_length=max_length)
        alone = routing_shares(known_model(), tokenizer, {"all": [text]}, max_length=max_length)

        assert (found.tokens, found.documents) == ([61], [2])
        np.testing.assert_allclose(alone.weight[0], expected, atol=1e-6)


def test_shares_of_each_kind_sum_to_one(tokenizer):
    model = named_model(per_token=2, vocab_size=len(tokenizer))
    found = routing_shares(model, tokenizer, {"a": ["some text", "more"], "b": ["x" * 50]}, max_length=16)

    for kind in ("weight", "top1", "picks"):
        np.testing.assert_allclose(getattr(found, kind).sum(axis=-1), 1.0, atol=1e-12)
        assert all(sum(row.values()) == pytest.approx(1.0, abs=1e-12) for row in found.table(kind).values())
    reached = found.bucket_tokens > 0
    np.testing.assert_allclose(found.position.sum(axis=-1)[reached], 1.0, atol=1e-12)
    tokens = np.array(found.tokens)[:, None, None]
    by_position = (found.position * found.bucket_tokens[:, :, None, None]).sum(axis=1) / tokens
    np.testing.assert_allclose(by_position, found.weight, atol=1e-12)


def test_batches_and_padding_change_nothing(tokenizer):
    model = named_model(vocab_size=len(tokenizer))
    texts = {"a": ["one", "a longer document", "x" * 40], "b": ["another", "and a last one of this kind"]}
    alone = routing_shares(model, tokenizer, texts, max_length=24, batch_size=1)
    for side in ("right", "left"):
        tokenizer.padding_side = side
        together = routing_shares(model, tokenizer, texts, max_length=24, batch_size=8)
        (batch,) = batches(tokenizer, texts["a"], max_length=24, batch_size=8)

        assert batch.mask[-1, 0] == (side == "right")
        assert_same(alone, together)


def test_more_documents_than_are_sorted_at_once_are_all_counted(model, tokenizer):
    found = routing_shares(model, tokenizer, {"a": ("mc" for _ in range(75))}, batch_size=2)

    assert (found.tokens, found.documents) == ([150], [75])
    np.testing.assert_allclose(found.weight[0, 0], mean(ROUTED, "mc"), atol=1e-6)


def test_documents_are_read_as_they_are_needed(model, tokenizer, monkeypatch):
    read, at_first_batch = 0, []

    def stream():
        nonlocal read
        for _ in range(500):
            read += 1
            yield "mc"

    attribution = model.attribution

    def noting(*args, **kwargs):
        at_first_batch.append(read)
        return attribution(*args, **kwargs)

    monkeypatch.setattr(model, "attribution", noting)
    routing_shares(model, tokenizer, {"a": stream()}, batch_size=4)

    assert at_first_batch[0] < 100
    assert read == 500


def test_an_expert_left_out_has_no_column_and_no_influence(tokenizer):
    model = named_model(vocab_size=len(tokenizer))
    texts = {"math": ["some text"]}
    with model.use_experts("public", "math"):
        expected = routing_shares(model, tokenizer, texts)
    poison(model, ["code", "news"])
    found = routing_shares(model, tokenizer, texts, active_experts=["math", "public"])

    assert found.experts == ["public", "math"]
    assert_same(found, expected, tolerance=0)
    assert model.active_experts == ["public", "math", "code", "news"]


def test_without_the_public_expert_there_is_no_public_share(model, tokenizer):
    found = routing_shares(model, tokenizer, TEXTS, active_experts=["math", "code"])

    assert found.public is None
    assert found.public_share() is None
    assert routing_shares(model, tokenizer, TEXTS).public_share()["math"] == pytest.approx((3 * 0.125 + 0.25) / 4)


def test_a_model_that_computes_nan_is_refused_and_padding_is_not_looked_at(model, tokenizer):
    tally = Tally("a", layers=1, experts=2, top_k=1, max_length=4)
    weights = torch.tensor([[[[0.25, 0.75]], [[float("nan"), 0.0]]]])
    tally.add(weights, torch.tensor([[1, 0]]))
    assert tally.weight[0].tolist() == [[0.25, 0.75]]

    with pytest.raises(NonFiniteTensorError, match="domain 'a'"):
        tally.add(weights, torch.tensor([[1, 2]]))
    poison(model, ["code"])
    with pytest.raises(NonFiniteTensorError, match="domain 'math'"):
        routing_shares(model, tokenizer, TEXTS)


def test_specialisation_is_the_own_share_less_the_mean_of_the_others(model, tokenizer):
    found = routing_shares(model, tokenizer, {"math": ["m"], "code": ["c"], "essays": ["p"]})

    assert found.specialisation(layer=0) == pytest.approx(
        {"math": 0.75 - (0.125 + 0.25) / 2, "code": 0.625 - (0.125 + 0.25) / 2}, abs=1e-6
    )
    assert found.specialisation("top1", layer=0) == {"math": 1.0, "code": 1.0}
    assert routing_shares(model, tokenizer, {"math": ["m"]}).specialisation() == {}


def test_a_file_gives_back_what_was_saved(model, tokenizer, tmp_path):
    found = routing_shares(model, tokenizer, TEXTS, max_length=9)
    back = RoutingShares.open(found.save(tmp_path / "shares.json"))

    assert_same(found, back, tolerance=0)
    assert (back.buckets, back.public, back.top_k) == (found.buckets, found.public, found.top_k)
    assert back.to_dict() == found.to_dict()
    (tmp_path / "shares.json").write_text('{"experts": []}')
    with pytest.raises(DamagedFileError, match="no routing shares"):
        RoutingShares.open(tmp_path / "shares.json")
    with pytest.raises(ConfigurationError, match="no routing shares 'none.json'"):
        RoutingShares.open(tmp_path / "none.json")


def test_a_model_in_training_is_left_in_training(model, tokenizer):
    model.train()
    routing_shares(model, tokenizer, TEXTS)

    assert model.training


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        ({"texts": {"a": "one string"}}, ConfigurationError, "one string"),
        ({"texts": {"a": ["fine", 3]}}, ConfigurationError, "'int'"),
        ({"texts": {"a": [""]}}, ConfigurationError, "'a' has no text"),
        ({"texts": {}}, ConfigurationError, "no domain"),
        ({"max_length": 1}, ConfigurationError, "max_length=1"),
        ({"batch_size": 0}, ConfigurationError, "batch_size=0"),
        (
            {"texts": {"a": ["m" * 200]}, "max_length": 256},
            ConfigurationError,
            "201 tokens, but the model has 128 positions",
        ),
        ({"top_k": 4}, ConfigurationError, "top_k is 4"),
        ({"active_experts": ["maht"]}, UnknownExpertError, "'math'"),
        ({"active_experts": [["public"], ["math"]]}, ExpertRowsError, "one set at a time"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(model, tokenizer, change, kind, says):
    given = {"texts": TEXTS, **change}
    with pytest.raises(kind, match=says):
        routing_shares(model, tokenizer, **given)


def test_a_dense_model_has_no_shares(tokenizer):
    with pytest.raises(NotFlexOlmoError, match="olmo2"):
        routing_shares(dense_model(), tokenizer, TEXTS)


def test_a_tokenizer_without_an_end_is_refused(model, tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ConfigurationError, match="neither BOS nor EOS"):
        routing_shares(model, tokenizer, TEXTS)


@pytest.mark.slow
def test_measuring_costs_little_more_than_a_forward_pass(tokenizer):
    model = named_model(**{"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4})
    texts = {"a": ["x" * 255] * 4}
    ids = torch.randint(2, 97, (4, 256))

    def seconds(action):
        times = []
        for _ in range(4):
            # Of this process: others may keep the machine busy.
            start = time.process_time()
            action()
            times.append(time.process_time() - start)
        return min(times)

    with torch.no_grad():
        forward = seconds(lambda: model(ids))
    measuring = seconds(lambda: routing_shares(model, tokenizer, texts, max_length=256))

    assert measuring < 1.1 * forward
