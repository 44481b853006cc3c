"""A new expert is trained beside any number of frozen ones: it alone moves, and it fits the plain public model."""

import pytest
import torch
from datasets import Dataset
from typer.testing import CliRunner

from flexolmo_hf import (
    ExpertPackage,
    ExpertSFTConfig,
    ExpertSFTTrainer,
    FlexOlmoForCausalLM,
    freeze_except,
    merge_experts,
)
from flexolmo_hf.cli import app
from flexolmo_hf.errors import (
    ConfigurationError,
    DuplicateExpertError,
    ExpertNotLoadedError,
    InvalidExpertNameError,
    UnknownExpertError,
)
from flexolmo_hf.modeling.upcycling import BIAS_START
from tests.composition.conftest import consortium, logits, tree
from tests.conftest import dense_model
from tests.modeling.test_compiled import NoWaiting
from tests.modeling.test_expert_sets import named_model, poison
from tests.trainers.conftest import TEXT
from tests.trainers.test_freezing import belongs_to, state

EVERY_PATH = pytest.mark.parametrize("per_token", [5, 2], ids=["dense path", "top-k path"])


def load(folder):
    return FlexOlmoForCausalLM.from_pretrained(folder)


def joined(per_token=5, **options):
    """A mixture of four experts with biases, and a fifth that is new."""
    model = named_model(4, router_bias=True)
    for mixture in model.mixtures:
        mixture.gate.bias.data = torch.tensor([0.0, -0.3, -0.2, -0.1])
    model.new_expert("chemistry", **options)
    model.config.num_experts_per_tok = per_token
    return model


# What is new.


@pytest.mark.parametrize("like", ["public", "code"])
def test_a_new_expert_is_a_copy_with_a_neutral_row_and_a_negative_start_and_shares_no_memory(like):
    model = joined(like=like)
    mine, theirs = model.expert_modules("chemistry"), model.expert_modules(like)
    at = model.expert_position("chemistry")

    assert model.expert_names[-1] == "chemistry"
    assert model.config.num_experts == model.config.num_experts_per_tok == 5
    for own, source, mixture in zip(mine, theirs, model.mixtures, strict=True):
        for one, other in zip(own.parameters(), source.parameters(), strict=True):
            assert torch.equal(one, other)
            assert one.data_ptr() != other.data_ptr()
        assert not mixture.gate.weight[at].any()
        assert mixture.gate.bias.tolist() == pytest.approx([0.0, -0.3, -0.2, -0.1, BIAS_START])


def test_row_and_bias_can_be_given():
    row = torch.randn(2, 64)
    model = joined(row=row, bias_start=-2.5)

    for layer, mixture in enumerate(model.mixtures):
        assert torch.equal(mixture.gate.weight[4], row[layer])
        assert mixture.gate.bias[4] == -2.5


def test_a_bias_start_gives_a_router_without_biases_some_and_none_leaves_it_without():
    model = named_model()
    model.new_expert("chemistry")
    assert not model.config.router_bias
    model.new_expert("physics", bias_start=-0.5)

    assert model.config.router_bias
    assert all(mixture.gate.bias.tolist() == [0, 0, 0, 0, 0, -0.5] for mixture in model.mixtures)


@torch.no_grad()
def test_it_takes_part_at_once_and_the_others_compute_what_they_did(input_ids):
    model = named_model()
    before = logits(model, input_ids)
    model.new_expert("chemistry", row=torch.randn(64))
    everyone = logits(model, input_ids)
    model.set_active_experts(["public", "math", "code", "news"])

    assert torch.equal(logits(model, input_ids), before)
    assert not torch.equal(everyone, before)


@pytest.mark.parametrize("value", [0.1, float("nan"), float("-inf"), float("inf")])
def test_a_bias_that_would_be_dead_or_not_finite_is_refused(value):
    with pytest.raises(ConfigurationError, match="at most 0"):
        FlexOlmoForCausalLM.from_dense(dense_model(), expert="math", router_bias=True, bias_start=value)
    with pytest.raises(ConfigurationError, match="at most 0"):
        named_model().new_expert("chemistry", bias_start=value)


@pytest.mark.parametrize("start", [0, -0.25, -3])
def test_the_start_of_the_bias_can_be_chosen(start):
    model = FlexOlmoForCausalLM.from_dense(dense_model(), expert="math", router_bias=True, bias_start=start)

    assert all(mixture.gate.bias.tolist() == [0, start] for mixture in model.mixtures)


@pytest.mark.parametrize("options", [{"expert": "math"}, {"router_bias": True}], ids=str)
def test_a_start_of_no_bias_is_refused(options):
    with pytest.raises(ConfigurationError, match="bias_start"):
        FlexOlmoForCausalLM.from_dense(dense_model(), bias_start=-1.0, **options)


REFUSED = {
    "a name that is taken": (["math"], {}, DuplicateExpertError),
    "a name in capitals": (["Math"], {}, DuplicateExpertError),
    "a path as name": (["a/b"], {}, InvalidExpertNameError),
    "a copy of nobody": (["chemistry", "maht"], {}, UnknownExpertError),
    "a row of another width": (["chemistry"], {"row": torch.ones(63)}, ConfigurationError),
    "a row with NaN": (["chemistry"], {"row": torch.full((64,), torch.nan)}, ConfigurationError),
}


@pytest.mark.parametrize(("given", "options", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_meant_is_refused_and_changes_nothing(given, options, error):
    model = named_model()
    before = state(model)
    with pytest.raises(error):
        model.new_expert(*given, **options)

    assert model.expert_names == model.config.expert_names == ["public", "math", "code", "news"]
    assert state(model).keys() == before.keys()


def test_an_expert_that_is_not_loaded_cannot_be_copied_nor_its_name_be_taken(tmp_path):
    named_model().save_pretrained(tmp_path)
    part = FlexOlmoForCausalLM.from_pretrained(tmp_path, active_experts=["public", "code"])
    with pytest.raises(ExpertNotLoadedError):
        part.new_expert("chemistry", like="math")
    with pytest.raises(DuplicateExpertError):
        part.new_expert("math")


def test_while_another_expert_is_trained_none_may_come():
    model = named_model()
    freeze_except(model, "math")
    with pytest.raises(ConfigurationError, match="being trained"):
        model.new_expert("chemistry")


# Training it.


@EVERY_PATH
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_only_the_new_expert_its_row_and_its_bias_move(tokenizer, tmp_path, per_token, checkpointing):
    dense = dense_model(vocab_size=len(tokenizer), tie_word_embeddings=False)
    model = FlexOlmoForCausalLM.from_dense(dense, expert="math", router_bias=True)
    for name in ("code", "news"):
        model.new_expert(name, row=torch.randn(64) * 0.1)
    model.new_expert("chemistry", row=torch.randn(64) * 0.1, bias_start=-0.1)
    model.config.num_experts_per_tok = per_token
    before = state(model)
    args = ExpertSFTConfig(
        expert="chemistry",
        output_dir=str(tmp_path),
        max_steps=3,
        learning_rate=1e-2,
        warmup_steps=0,
        weight_decay=0.1,
        max_length=32,
        gradient_checkpointing=checkpointing,
        bf16=False,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to="none",
    )
    ExpertSFTTrainer(model, args=args, train_dataset=Dataset.from_list(TEXT), processing_class=tokenizer).train()
    after = state(model)

    for key in before:
        if belongs_to(key, 4):
            assert not torch.equal(after[key], before[key]), key
        elif ".mlp.gate." in key:
            assert torch.equal(after[key][:4], before[key][:4]), key
            assert not torch.equal(after[key][4], before[key][4]), key
        else:
            assert torch.equal(after[key], before[key]), key


@EVERY_PATH
def test_its_gradient_is_that_of_the_formula(input_ids, per_token):
    model = joined(per_token, row=torch.randn(64), bias_start=-0.1).double()
    freeze_except(model, "chemistry")
    (layer, gate) = (model.mixtures[0], model.mixtures[0].gate)
    hidden = torch.randn(2, 5, 64, dtype=torch.float64)
    layer(hidden).square().sum().backward()
    found = [gate.trained_row.grad, gate.trained_bias.grad, *(p.grad for p in layer.experts["4"].parameters())]
    row, bias = gate.trained_row.detach().requires_grad_(), gate.trained_bias.detach().requires_grad_()
    own = [p.detach().requires_grad_() for p in layer.experts["4"].parameters()]
    scores = hidden @ torch.cat([gate.weight[:4], row[None]]).T + torch.cat([gate.bias[:4], bias])
    probs = scores.softmax(-1, dtype=torch.float32).double()
    kept = torch.zeros_like(probs).scatter(-1, probs.topk(per_token).indices, 1.0)
    outputs = [expert(hidden) for expert in list(layer.experts.values())[:4]]
    outputs.append((torch.nn.functional.silu(hidden @ own[0].T) * (hidden @ own[1].T)) @ own[2].T)
    (torch.stack(outputs, -1) * (probs * kept)[..., None, :]).sum(-1).square().sum().backward()

    assert (kept[..., 4].sum() < kept[..., 4].numel()) == (per_token == 2)
    assert found[2].any()
    for mine, want in zip(found, [row.grad, bias.grad, *(p.grad for p in own)], strict=True):
        torch.testing.assert_close(mine, want, atol=1e-6, rtol=1e-5)


def test_forward_and_backward_on_the_dense_path_wait_for_no_device(input_ids):
    model = joined()
    freeze_except(model, "chemistry")
    model.train()
    length = input_ids.shape[1]
    # Four dimensions: upstream reads masks of two on the host.
    mask = torch.ones(len(input_ids), 1, length, length, dtype=torch.bool).tril()
    with NoWaiting():
        model(input_ids, attention_mask=mask, labels=input_ids, use_cache=False).loss.backward()

    assert all(mixture.gate.trained_row.grad.any() for mixture in model.mixtures)
    model.config.num_experts_per_tok = 2
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        model(input_ids, attention_mask=mask, labels=input_ids, use_cache=False).loss.backward()


def test_experts_that_are_off_take_no_part_in_its_training(input_ids):
    model = joined(row=torch.randn(64))
    model.set_active_experts(["public", "math", "chemistry"])
    freeze_except(model, "chemistry")
    poison(model, ["code", "news"])
    model(input_ids, labels=input_ids).loss.backward()

    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


# Handing it on.


def test_its_package_merges_with_the_plain_public_model_and_with_the_mixture(tmp_path, input_ids):
    owners = consortium(tmp_path, router_bias=["math"])
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    model = load(tmp_path / "merged")
    model.new_expert("news", row=torch.randn(64))
    freeze_except(model, "news")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    model(input_ids, labels=input_ids).loss.backward()
    optimizer.step()
    ExpertPackage.from_model(model, "news").save_pretrained(tmp_path / "news")
    packages = {**owners.packages, "news": tmp_path / "news"}
    merge_experts(owners.anchor, packages, tmp_path / "from the plain one")
    merge_experts(tmp_path / "merged", {"news": tmp_path / "news"}, tmp_path / "from the mixture")
    want = logits(model, input_ids)

    for name in ("from the plain one", "from the mixture"):
        assert torch.equal(logits(load(tmp_path / name), input_ids), want)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_init_gives_a_mixture_a_new_expert(tmp_path, input_ids):
    owners = consortium(tmp_path)
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    done = run("init", tmp_path / "merged", tmp_path / "out", "--expert", "news", "--router-bias", "--bias-start=-2")
    made, expected = load(tmp_path / "out"), load(tmp_path / "merged")
    expected.new_expert("news", bias_start=-2)

    assert done.exit_code == 0, done.output
    assert "experts ['public', 'math', 'code', 'news']" in done.stdout
    assert torch.equal(logits(made, input_ids), logits(expected, input_ids))
    assert made.mixtures[0].gate.bias.tolist() == [0, 0, 0, -2]


def test_init_of_a_dense_model_takes_the_start_of_the_bias(tmp_path):
    owners = consortium(tmp_path)
    done = run("init", owners.anchor, tmp_path / "out", "--expert", "news", "--router-bias", "--bias-start=-0.5")

    assert done.exit_code == 0, done.output
    assert load(tmp_path / "out").mixtures[1].gate.bias.tolist() == [0, -0.5]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "'flex_olmo'"),
        (["--expert", "math"], "'math' appears twice"),
        (["--expert", "news", "--bias-start=-1"], "no biases"),
        (["--expert", "news", "--router-bias", "--bias-start=1"], "at most 0"),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, list) else "",
)
def test_init_of_a_mixture_refuses_what_cannot_be_meant_and_writes_nothing(tmp_path, options, says):
    owners = consortium(tmp_path)
    merge_experts(owners.anchor, owners.packages, tmp_path / "merged")
    before = tree(tmp_path)
    result = run("init", tmp_path / "merged", tmp_path / "out", *options)

    assert result.exit_code == 2, repr(result.exception)
    assert says in result.stderr
    assert tree(tmp_path) == before
