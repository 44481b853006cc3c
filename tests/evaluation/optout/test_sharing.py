"""What the sets share is computed once, and nothing that differs between them is shared."""

import threading

import pytest
import torch

from flexolmo_hf.evaluation.optout.sharing import shared_first_layer
from tests.conftest import TINY
from tests.modeling.test_expert_sets import NAMES, named_model, others

SETS = [NAMES, *([name for name in NAMES if name != off] for off in NAMES), ["public"]]


@pytest.fixture
def ids():
    return torch.randint(2, TINY["vocab_size"], (6, 11))


def counted(module):
    """Count the calls that reach a module's own computation."""
    calls, forward = [], module.forward

    def count(*args, **kwargs):
        calls.append(1)
        return forward(*args, **kwargs)

    module.forward = count
    return calls


@pytest.mark.parametrize("per_token", [4, 2], ids=["all of 4", "2 of 4"])
@pytest.mark.parametrize("implementation", ["auto", "eager", "grouped_mm"])
@pytest.mark.parametrize("tokens", [(1, 5), (4, 16), (5, 13), (8, 11), (3, 70)], ids=str)
@torch.no_grad()
def test_sharing_changes_no_bit_of_any_sets_logits(per_token, implementation, tokens):
    model = named_model(per_token)
    model.set_experts_implementation(implementation)
    ids = torch.randint(2, TINY["vocab_size"], tokens)
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0

    def logits(names):
        return model(ids, attention_mask=mask, use_cache=False, active_experts=names).logits

    alone = [logits(names) for names in SETS]
    with shared_first_layer(model, ids.numel()):
        assert [
            names for names, before in zip(SETS, alone, strict=True) if not torch.equal(logits(names), before)
        ] == []


@torch.no_grad()
def test_the_first_layer_runs_once_for_all_sets_and_the_others_for_each(ids):
    model = named_model()
    first, second = model.model.layers
    attention, experts = counted(first.self_attn), [counted(expert) for expert in first.mlp.experts.values()]
    later = counted(second.self_attn)
    with shared_first_layer(model, 66):
        for names in SETS:
            model(ids, use_cache=False, active_experts=names)

    assert len(attention) == 1
    assert [len(calls) for calls in experts] == [1, 1, 1, 1]
    assert len(later) == len(SETS)


@torch.no_grad()
def test_the_same_tokens_under_another_mask_are_computed_anew(ids):
    model = named_model()
    mask = torch.ones_like(ids)
    mask[:, 4:] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits
    with shared_first_layer(model, 66):
        model(ids, use_cache=False)
        assert torch.equal(model(ids, attention_mask=mask, use_cache=False).logits, expected)


@torch.no_grad()
def test_a_cache_is_filled_by_every_call(ids):
    model = named_model()
    expected = model.generate(ids, max_new_tokens=4, do_sample=False)
    with shared_first_layer(model, 66):
        model(ids, use_cache=False)
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), expected)


def test_gradients_go_through_the_first_layer(ids):
    model = named_model()
    with shared_first_layer(model, 66):
        with torch.no_grad():
            model(ids, use_cache=False)
        model(ids, labels=ids, use_cache=False).loss.backward()

    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_another_thread_gets_its_own_results(ids):
    model = named_model()
    other = ids.flip(1)
    with torch.no_grad():
        expected = model(other, use_cache=False).logits
    seen = []

    def work():
        with torch.no_grad():
            seen.extend(torch.equal(model(other, use_cache=False).logits, expected) for _ in range(20))

    with shared_first_layer(model, 66), torch.no_grad():
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(20):
            model(ids, use_cache=False)
        thread.join()

    assert seen == [True] * 20


def test_nothing_is_left_in_the_model_and_what_was_in_the_place_of_a_forward_comes_back(ids):
    model = named_model()
    first = model.model.layers[0]
    counted(first.self_attn)
    mine = first.self_attn.forward
    with pytest.raises(RuntimeError), shared_first_layer(model, 66):
        assert first.self_attn.forward is not mine
        raise RuntimeError

    assert first.self_attn.forward is mine
    assert [expert for expert in first.mlp.experts.values() if "forward" in vars(expert)] == []


@torch.no_grad()
def test_an_expert_that_no_token_ever_chooses_changes_the_others_weights_all_the_same(ids):
    """Why windows that an expert has no part in are measured again without it."""
    model = named_model(per_token=1)
    # Scaled down, its score is near 0, and the others' are made to lie on both sides: it is never the best.
    for mixture in model.mixtures:
        mixture.gate.weight[3].zero_()
        mixture.gate.weight[1] = -mixture.gate.weight[0]
    attribution = model.attribution(ids)
    with_all, without = (model(ids, active_experts=names).logits for names in (NAMES, others(["news"])))

    assert attribution.shares["news"] == 0
    assert not torch.allclose(with_all, without, atol=1e-4)
