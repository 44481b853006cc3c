"""One set of settings for all trainers, and whole models that are trained as they say."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import AutoModelForCausalLM
from transformers.models.flex_olmo.modeling_flex_olmo import load_balancing_loss_func

from flexolmo_hf import ExpertSFTConfig, FlexOlmoForCausalLM, RouterSFTConfig
from flexolmo_hf.errors import (
    ConfigurationError,
    NotFlexOlmoError,
    OutputFolderNotEmptyError,
    ResumeMismatchError,
)
from flexolmo_hf.evaluation.baselines.btx import build_btx, train_btx
from flexolmo_hf.evaluation.baselines.dense import train_dense
from flexolmo_hf.evaluation.baselines.training import TrainingSettings
from flexolmo_hf.evaluation.baselines.unrestricted_moe import build_unrestricted_moe, train_unrestricted_moe
from flexolmo_hf.evaluation.baselines.whole_model import (
    WholeModelSFTConfig,
    WholeModelSFTTrainer,
    free_mixture,
    load_whole,
)
from tests.conftest import dense_model, tree
from tests.evaluation.baselines.owners import TEXT, dense_owners
from tests.modeling.test_expert_sets import named_model

QUICK = TrainingSettings(rate=1e-2, sequence=32, batch=4, steps=3, warmup=0, on_cpu=True)
CHANGED = {"steps": None, "tokens": 300}


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")


def state(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()


def moved(before, after):
    return {key for key in before if not torch.equal(before[key], after[key])}


@pytest.mark.parametrize(
    "config", [lambda **f: ExpertSFTConfig(expert="math", **f), RouterSFTConfig, WholeModelSFTConfig]
)
def test_every_trainer_takes_the_settings(tmp_path, config):
    args = config(**QUICK.as_fields(tmp_path))

    assert (args.learning_rate, args.max_length, args.max_steps) == (1e-2, 32, 3)
    assert (args.router_z_loss_coef, args.lm_z_loss_coef, args.weight_decay) == (1e-3, 1e-5, 0)
    json.dumps(QUICK.as_fields(tmp_path))


def test_no_setting_is_lost_on_the_way_to_the_trainer(tmp_path):
    own = {"weight_decay": 0.1, "router_z_loss": 0.2, "output_z_loss": 0.3, "warmup": 0.4, "seed": 5, "save_every": 6}
    args = WholeModelSFTConfig(**TrainingSettings(**{**QUICK.__dict__, **own, "accumulation": 7}).as_fields(tmp_path))

    assert (args.weight_decay, args.router_z_loss_coef, args.lm_z_loss_coef) == (0.1, 0.2, 0.3)
    assert (args.warmup_steps, args.seed, args.save_steps) == (0.4, 5, 6)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 7)
    # The paper's, whatever is asked for.
    assert (args.adam_beta1, args.adam_beta2, args.max_grad_norm, args.lr_scheduler_type) == (0.9, 0.95, 1.0, "cosine")


def test_tokens_are_rounded_up_to_whole_steps():
    settings = TrainingSettings(sequence=32, batch=4, accumulation=2, tokens=1000)

    assert settings.tokens_per_step == 256
    assert settings.max_steps == 4
    assert settings.as_fields("run")["max_steps"] == 4


def test_passes_over_the_text_decide_where_nothing_else_does():
    fields = TrainingSettings(epochs=2).as_fields("run")

    assert fields["num_train_epochs"] == 2
    assert "max_steps" not in fields


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"tokens": 5, "steps": 5}, "Both tokens=5 and steps=5"),
        ({"rate": 0}, "rate is 0"),
        ({"sequence": -1}, "sequence is -1"),
        ({"warmup": -0.1}, "warmup is -0.1"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(changes, says):
    with pytest.raises(ConfigurationError, match=says):
        TrainingSettings(**changes)


def test_dense_training_moves_everything_and_writes_a_dense_model(tmp_path):
    owners = dense_owners(tmp_path)
    before = state(owners.anchor)
    out = train_dense(owners.anchor, TEXT, tmp_path / "math", QUICK)

    assert moved(before, state(out)) == set(before)
    assert AutoModelForCausalLM.from_pretrained(out).config.model_type == "olmo2"
    assert (out / "tokenizer.json").is_file()
    assert not list(out.glob("*.bin"))


def test_dense_training_of_the_networks_alone_moves_nothing_else(tmp_path):
    owners = dense_owners(tmp_path)
    before = state(owners.anchor)
    out = train_dense(owners.anchor, TEXT, tmp_path / "math", QUICK, trains="feed_forward")

    assert moved(before, state(out)) == {key for key in before if ".mlp." in key}


def test_the_same_seed_gives_the_same_model_and_another_gives_another(tmp_path):
    owners = dense_owners(tmp_path)
    one, same = (state(train_dense(owners.anchor, TEXT, tmp_path / name, QUICK)) for name in ("one", "same"))
    other = TrainingSettings(**{**QUICK.__dict__, "seed": 1})

    assert not moved(one, same)
    assert moved(one, state(train_dense(owners.anchor, TEXT, tmp_path / "other", other)))


def test_dense_loss_is_the_plain_loss_and_the_output_z_loss(tmp_path):
    owners = dense_owners(tmp_path)
    model = copy.deepcopy(owners.models["public"])
    run = WholeModelSFTTrainer(
        model=model,
        args=WholeModelSFTConfig(**{**QUICK.as_fields(tmp_path), "lm_z_loss_coef": 0.25}),
        train_dataset=Dataset.from_dict({"text": TEXT}),
        processing_class=owners.tokenizer,
    )
    batch = next(iter(run.get_train_dataloader()))
    model.train()
    found = run.compute_loss(model, dict(batch), num_items_in_batch=None)
    options = {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch}
    logits = owners.models["public"](batch["input_ids"], **options).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    plain = F.cross_entropy(logits[counted], labels[counted])

    torch.testing.assert_close(
        found, plain + 0.25 * logits.logsumexp(-1).square()[counted].mean(), rtol=1e-5, atol=1e-5
    )


def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    owners = dense_owners(tmp_path)
    saving = TrainingSettings(**{**QUICK.__dict__, "save_every": 1})
    whole = state(train_dense(owners.anchor, TEXT, tmp_path / "whole", saving, run_dir=tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-3").rename(tmp_path / "lost")

    resumed = train_dense(owners.anchor, TEXT, tmp_path / "resumed", saving, run_dir=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "checkpoint-2").is_dir()
    assert not moved(whole, state(resumed))

    changed = TrainingSettings(**{**saving.__dict__, "rate": 1e-3})
    with pytest.raises(ResumeMismatchError, match="learning_rate"):
        train_dense(owners.anchor, TEXT, tmp_path / "changed", changed, run_dir=tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_with_another_load_balancing(tmp_path):
    owners = dense_owners(tmp_path)
    start = build_unrestricted_moe(owners.anchor, ["math", "code"], tmp_path / "start", experts_per_token=1)
    saving = TrainingSettings(**{**QUICK.__dict__, "steps": 1, "save_every": 1})
    run = {"run_dir": tmp_path / "run"}
    train_unrestricted_moe(start, TEXT, tmp_path / "one", saving, load_balancing_coef=0.1, **run)

    with pytest.raises(ResumeMismatchError, match="load_balancing_coef"):
        train_unrestricted_moe(start, TEXT, tmp_path / "two", saving, load_balancing_coef=0.2, resume=True, **run)


def test_a_joint_mixture_starts_as_the_anchor_and_then_moves_everything(tmp_path):
    owners = dense_owners(tmp_path)
    start = build_unrestricted_moe(owners.anchor, ["math", "code"], tmp_path / "start")
    ids = torch.arange(2, 24).view(2, 11)
    with torch.no_grad():
        expected = owners.models["public"](ids).logits
        found = FlexOlmoForCausalLM.from_pretrained(start)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    out = train_unrestricted_moe(start, TEXT, tmp_path / "trained", QUICK)
    assert moved(state(start), state(out)) == set(state(start))


def test_experts_of_a_joint_mixture_part_because_their_rows_differ(tmp_path):
    owners = dense_owners(tmp_path)
    start = build_unrestricted_moe(owners.anchor, ["math"], tmp_path / "start")
    equal = build_unrestricted_moe(owners.anchor, ["math"], tmp_path / "equal", router_embeddings={})
    parted, one = (
        state(train_unrestricted_moe(path, TEXT, tmp_path / f"{path.name} trained", QUICK)) for path in (start, equal)
    )
    first, second = (f"model.layers.0.mlp.experts.{index}.up_proj.weight" for index in (0, 1))

    assert not torch.allclose(parted[first], parted[second], atol=1e-5)
    # Equal rows: equal gradients for ever.
    assert torch.equal(one[first], one[second])


@pytest.mark.parametrize(("trains", "part"), [("feed_forward", ".mlp."), ("router", ".mlp.gate."), ("everything", "")])
def test_training_after_mixing_moves_the_chosen_part(tmp_path, trains, part):
    owners = dense_owners(tmp_path, "math")
    mixed = build_btx(owners.anchor, owners.experts, tmp_path / "mixed")
    out = train_btx(mixed, TEXT, tmp_path / "trained", QUICK, trains=trains)

    assert moved(state(mixed), state(out)) == {key for key in state(mixed) if part in key}
    assert FlexOlmoForCausalLM.from_pretrained(out).expert_names == ["public", "math"]


def test_the_public_bias_stays_zero_while_everything_moves(tmp_path):
    owners = dense_owners(tmp_path)
    model = FlexOlmoForCausalLM.from_dense(owners.anchor, expert="math", router_bias=True)
    model.save_pretrained(tmp_path / "start")
    owners.tokenizer.save_pretrained(tmp_path / "start")
    out = train_unrestricted_moe(tmp_path / "start", TEXT, tmp_path / "out", QUICK)

    for mixture in FlexOlmoForCausalLM.from_pretrained(out).mixtures:
        assert mixture.gate.bias[0] == 0
        assert mixture.gate.bias[1] != -1
        assert mixture.gate.weight[0].any()


@pytest.mark.parametrize("steps", [1, 2], ids=["at once", "accumulated"])
def test_the_load_balancing_loss_is_upstreams_and_off_unless_asked_for(tmp_path, steps):
    owners = dense_owners(tmp_path)
    start = build_unrestricted_moe(owners.anchor, ["math", "code"], tmp_path / "start", experts_per_token=1)
    losses = {}
    for weight in (0.0, 0.5):
        model = FlexOlmoForCausalLM.from_pretrained(start)
        run = WholeModelSFTTrainer(
            model=model,
            args=WholeModelSFTConfig(**QUICK.as_fields(tmp_path), load_balancing_coef=weight),
            train_dataset=Dataset.from_dict({"text": TEXT}),
            processing_class=owners.tokenizer,
        )
        batch = next(iter(run.get_train_dataloader()))
        model.train()
        # Told the tokens of the whole step, the host leaves the averaging over its batches to the losses.
        run.current_gradient_accumulation_steps = steps
        tokens = None if steps == 1 else torch.tensor(steps * batch["labels"].numel())
        losses[weight] = run.compute_loss(model, dict(batch), num_items_in_batch=tokens)
    options = {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch}
    with torch.no_grad():
        logits = model(batch["input_ids"], **options, output_router_logits=True, use_cache=False).router_logits
    expected = 0.5 * load_balancing_loss_func(logits, 3, 1, batch.get("attention_mask")) / steps

    torch.testing.assert_close(losses[0.5] - losses[0.0], expected, atol=1e-5, rtol=1e-4)


def test_what_cannot_be_trained_is_refused_and_nothing_is_written(tmp_path, refused):
    owners = dense_owners(tmp_path)
    dense_model().save_pretrained(tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    out = tmp_path / "out"

    with refused(ConfigurationError, "no router"):
        train_dense(owners.anchor, TEXT, out, QUICK, trains="router")
    with refused(ConfigurationError, "'nothing'"):
        train_dense(owners.anchor, TEXT, out, QUICK, trains="nothing")
    with refused(ConfigurationError, "empty"):
        train_dense(owners.anchor, [], out, QUICK)
    with refused(ConfigurationError, "run_dir"):
        train_dense(owners.anchor, TEXT, out, QUICK, resume=True)
    with refused(OutputFolderNotEmptyError):
        train_dense(owners.anchor, TEXT, owners.anchor, QUICK)
    with refused(NotFlexOlmoError, "llama"):
        train_dense(tmp_path / "other", TEXT, out, QUICK)


def test_what_was_saved_in_half_precision_is_trained_in_full(tmp_path):
    owners = dense_owners(tmp_path)
    owners.models["public"].to(torch.bfloat16).save_pretrained(owners.anchor)

    assert load_whole(owners.anchor).dtype == torch.float32


def test_a_mixture_with_an_expert_switched_off_is_refused():
    model = named_model()
    model.set_active_experts(["public", "math"])

    with pytest.raises(ConfigurationError, match="in force"):
        free_mixture(model, "everything")


def test_training_leaves_nothing_but_the_result(tmp_path):
    owners = dense_owners(tmp_path)
    before = set(tree(tmp_path))
    train_dense(owners.anchor, TEXT, tmp_path / "out", QUICK)

    assert {name for name in set(tree(tmp_path)) - before if name.parts[0] != "out"} == set()
