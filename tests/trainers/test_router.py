"""Router tuning moves rows and biases and nothing else, on every expert's data alike, and keeps what was before."""

import json
from collections import Counter

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import Trainer, TrainerCallback
from trl import SFTConfig

from flexolmo_hf import (
    FlexOlmoConfig,
    FlexOlmoForCausalLM,
    RouterSFTConfig,
    RouterSFTTrainer,
    freeze_all_but_routers,
    rollback_router,
    unfreeze,
)
from flexolmo_hf.errors import (
    ConfigurationError,
    ExpertNotLoadedError,
    FrozenMovedError,
    NotFlexOlmoError,
    ResumeMismatchError,
    UnknownExpertError,
)
from flexolmo_hf.modeling.files.router_base import BASE_RECORD, BASE_WEIGHTS, current_router, read_router_base
from flexolmo_hf.trainers.freezing import project_biases
from tests.conftest import TINY, dense_model, shaken
from tests.modeling.test_expert_sets import named_model
from tests.trainers.conftest import SHORT_RUN
from tests.trainers.test_expert import Watch
from tests.trainers.test_freezing import OPTIMIZERS, state

NAMES = ["public", "math", "code"]
BIASES = [0.0, -0.5, -0.25]


def rows_of(letter, count):
    return Dataset.from_list([{"text": letter * (5 + n % 4)} for n in range(count)])


def proxies(**counts):
    letters = {"public": "p", "math": "m", "code": "c"}
    return {name: rows_of(letters[name], count) for name, count in (counts or dict.fromkeys(NAMES, 12)).items()}


def mixture(tokenizer, *, per_token=3, router_bias=True):
    settings = {**TINY, "vocab_size": len(tokenizer), "num_experts": 3, "expert_names": NAMES}
    config = FlexOlmoConfig(**settings, num_experts_per_tok=per_token, router_bias=router_bias)
    model = shaken(FlexOlmoForCausalLM(config))
    for layer in model.mixtures:
        if router_bias:
            layer.gate.bias.data = torch.tensor(BIASES)
    return model


@pytest.fixture
def model(tokenizer):
    return mixture(tokenizer)


@pytest.fixture
def tuning(model, tokenizer, tmp_path):
    """A trainer for a few steps, settings changed by keyword."""

    def make(data=None, *, using=None, **changes):
        values = {key: value for key, value in SHORT_RUN.items() if key != "expert"}
        values |= {"output_dir": str(tmp_path / "run"), "max_steps": 3, "per_device_train_batch_size": 6}
        return RouterSFTTrainer(
            model if using is None else using,
            RouterSFTConfig(**{**values, **changes}),
            proxies() if data is None else data,
            processing_class=tokenizer,
        )

    return make


# What moves.


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
@pytest.mark.parametrize("per_token", [4, 2], ids=["dense path", "top-k path"])
@pytest.mark.parametrize("train_public_row", [True, False], ids=["public row too", "public row held"])
def test_under_any_optimizer_all_rows_and_biases_move_but_public_ones_that_are_held(
    input_ids, optimizer, per_token, train_public_row
):
    model = named_model(per_token, router_bias=True)
    for layer in model.mixtures:
        layer.gate.bias.data = torch.tensor([0.0, -0.3, -0.2, -0.1])
    before = state(model)
    trained = freeze_all_but_routers(model, train_public_row=train_public_row)
    steps = optimizer([p for p in model.parameters() if p.requires_grad])
    for _ in range(3):
        model(input_ids, labels=input_ids).loss.backward()
        steps.step()
        steps.zero_grad()
        project_biases(model)
        biases = [layer.gate.state_dict()["bias"] for layer in model.mixtures]
        assert all(bias[0] == 0 and bias.max() <= 0 for bias in biases)
    after = state(model)
    unfreeze(model)

    assert all(".mlp.gate." in name for name in trained)
    assert after.keys() == before.keys()
    for key in before:
        moved = [not torch.equal(new, old) for new, old in zip(after[key], before[key], strict=True)]
        if key.endswith(".mlp.gate.weight"):
            assert moved == [train_public_row, True, True, True], key
        elif key.endswith(".mlp.gate.bias"):
            assert moved == [False, True, True, True], key
        else:
            assert not any(moved), key
    for key, tensor in state(model).items():
        assert torch.equal(tensor, after[key]), key


def test_without_biases_only_the_matrices_are_trained():
    model = named_model()

    assert freeze_all_but_routers(model) == [f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)]


def test_training_moves_rows_and_biases_and_nothing_else(tuning, model):
    before, seen = state(model), []
    run = tuning(max_steps=4)
    run.add_callback(Watch(lambda: seen.extend(layer.gate.rows()[1].tolist() for layer in model.mixtures)))
    run.train()
    after = state(model)

    for key in before:
        assert torch.equal(after[key], before[key]) == (".mlp.gate." not in key), key
        if key.endswith(".mlp.gate.weight"):
            assert (after[key] != before[key]).any(dim=-1).all(), key
    assert len(seen) == 8
    assert all(bias[0] == 0 and max(bias) <= 0 and bias != BIASES for bias in seen)


def test_a_bias_at_zero_is_not_dead_and_one_that_is_pushed_up_stays_at_zero(model, input_ids):
    for layer in model.mixtures:
        layer.gate.bias.data = torch.tensor([0.0, 0.5, 0.0])
    freeze_all_but_routers(model)
    assert all(layer.gate.rows()[1].tolist() == [0, 0, 0] for layer in model.mixtures)
    model(input_ids, labels=input_ids).loss.backward()

    for layer in model.mixtures:
        assert layer.gate.bias.grad[1:].abs().min() > 0
        assert layer.gate.bias.max() == 0


def test_biases_that_training_pushes_up_stay_at_zero_and_below(tuning, model):
    for layer in model.mixtures:
        layer.gate.bias.data[1:] = -1e-4
    run, seen = tuning(learning_rate=5e-2, lr_scheduler_type="constant"), []
    run.add_callback(Watch(lambda: seen.append(torch.stack([m.gate.state_dict()["bias"] for m in model.mixtures]))))
    run.train()
    biases = torch.stack(seen)

    assert biases.max() == 0
    assert (biases[..., 1:] == 0).any()
    assert (biases[..., 0] == 0).all()


def test_a_run_in_which_something_frozen_moves_stops(tuning, model):
    run = tuning()

    def meddle():
        model.expert_modules("math")[0].up_proj.weight.data[0, 0] += 1

    run.add_callback(Watch(meddle))
    with pytest.raises(FrozenMovedError, match=r"experts\.1\.up_proj"):
        run.train()


def test_freezing_works_with_any_trainer(model, tokenizer, tmp_path):
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    before = state(model)
    freeze_all_but_routers(model)
    rows = Dataset.from_list([dict(tokenizer("abc" * 5)) for _ in range(8)])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, weight_decay=0.1, save_strategy="no", disable_tqdm=True
    )
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    Trainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()
    after = state(model)

    assert {key for key in before if not torch.equal(after[key], before[key])} == {k for k in before if ".gate." in k}
    assert all(layer.gate.rows()[1][0] == 0 for layer in model.mixtures)


# The data.


def test_rows_that_a_function_of_the_caller_makes_into_text_need_no_column(model, tokenizer, tmp_path):
    rows = {name: Dataset.from_list([{"body": name}] * 4) for name in NAMES}
    args = RouterSFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, bf16=False, report_to="none")
    run = RouterSFTTrainer(model, args, rows, formatting_func=lambda row: row["body"], processing_class=tokenizer)

    assert letters_of(run, tokenizer) == dict.fromkeys("pmc", 4)


def letters_of(trainer, tokenizer):
    return Counter(tokenizer.decode(row)[0] for row in trainer.train_dataset["input_ids"])


@pytest.mark.parametrize("sizes", [(12, 12, 12), (20, 3, 1), (2, 7, 11)])
def test_every_expert_has_the_same_number_of_sequences(tuning, tokenizer, sizes):
    run = tuning(proxies(**dict(zip(NAMES, sizes, strict=True))))

    assert letters_of(run, tokenizer) == dict.fromkeys("pmc", max(sizes))
    texts = {tuple(row) for row in run.train_dataset["input_ids"]}
    assert len(texts) == sum(min(size, 4) for size in sizes)


def test_packed_sequences_hold_texts_of_one_expert_each_and_are_as_many_of_each(tuning, tokenizer):
    run = tuning(proxies(public=40, math=10, code=10), packing=True)
    kinds = Counter(
        frozenset(tokenizer.decode(row, skip_special_tokens=True)) for row in run.train_dataset["input_ids"]
    )

    assert kinds.keys() == {frozenset(letter) for letter in "pmc"}
    assert len(set(kinds.values())) == 1


def test_steps_see_every_expert_alike(tuning, tokenizer):
    run, seen = tuning(max_steps=6), Counter()
    step = run.training_step

    def watched(model, inputs, *args, **kwargs):
        seen.update(tokenizer.decode(row)[0] for row in inputs["input_ids"])
        return step(model, inputs, *args, **kwargs)

    run.training_step = watched
    run.train()

    assert seen == dict.fromkeys("pmc", 12)


def test_streams_are_taken_in_turn(tuning, tokenizer):
    streams = {name: source.to_iterable_dataset() for name, source in proxies().items()}
    run = tuning(streams)
    assert isinstance(run.train_dataset, IterableDataset)
    first = [tokenizer.decode(row["input_ids"])[0] for row in run.train_dataset.take(6)]

    assert first == list("pmcpmc")


def test_evaluation_data_stays_what_it_is(model, tokenizer, tmp_path):
    args = RouterSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=32)
    data = proxies()
    evaluated = {"train": data["public"], "math": data["math"]}
    run = RouterSFTTrainer(model, args, data, eval_dataset=evaluated, processing_class=tokenizer)

    assert [len(rows) for rows in (run.train_dataset, *run.eval_dataset.values())] == [36, 12, 12]


def test_columns_of_different_kinds_of_rows_do_not_get_in_the_way(tuning):
    data = proxies()
    data["math"] = Dataset.from_list([{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(12)])

    assert len(tuning(data).train_dataset) == 36


def test_an_expert_without_proxies_is_tuned_too_and_that_is_said(tuning, model, caplog):
    data = proxies(public=6, math=6)
    import logging

    with caplog.at_level(logging.WARNING):
        from flexolmo_hf.trainers import router_data

        router_data.logger.addHandler(caplog.handler)
        run = tuning(data)
        router_data.logger.removeHandler(caplog.handler)
    run.train()

    assert "no proxy data for ['code']" in caplog.text
    assert model.router_base.proxies == ["math"]


# The losses.


def test_the_loss_is_the_plain_loss_and_both_z_losses(tuning, model):
    run = tuning(gradient_checkpointing=False, router_z_loss_coef=0.5, lm_z_loss_coef=0.25)
    batch = next(iter(run.get_train_dataloader()))
    model.train()
    found = run.compute_loss(model, dict(batch), num_items_in_batch=None)
    mask = batch["attention_mask"]
    output = model(batch["input_ids"], attention_mask=mask, output_router_logits=True, use_cache=False)
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    logits = output.logits[:, :-1].float()
    plain = torch.nn.functional.cross_entropy(logits[counted], labels[counted])
    lm_z = logits.logsumexp(-1).square()[counted].mean()
    kept = mask.flatten().bool()
    router_z = torch.stack([layer[kept].logsumexp(-1).square().mean() for layer in output.router_logits]).mean()

    torch.testing.assert_close(found, plain + 0.5 * router_z + 0.25 * lm_z, atol=1e-4, rtol=1e-5)


def test_the_log_has_every_experts_share_and_bias_and_how_far_the_rows_have_moved(tuning, model):
    run = tuning(logging_steps=1)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]

    assert len(logged) == 3
    for entry in logged:
        assert sum(entry[f"routing_share_{name}"] for name in NAMES) == pytest.approx(1, abs=1e-3)
        assert entry["tokens_per_second"] > 0
    assert 0 < logged[0]["row_distance"] < logged[-1]["row_distance"]
    for at, name in enumerate(NAMES):
        now = sum(layer.gate.bias[at].item() for layer in model.mixtures) / len(model.mixtures)
        assert logged[-1][f"router_bias_{name}"] == pytest.approx(now, abs=1e-5)
    assert logged[-1]["router_bias_public"] == 0


def test_without_biases_none_are_logged(tuning, tokenizer):
    run = tuning(using=mixture(tokenizer, router_bias=False), logging_steps=1)
    run.train()
    assert not [key for entry in run.state.log_history for key in entry if "bias" in key]


def test_the_papers_values_are_the_defaults(tmp_path):
    args = RouterSFTConfig(output_dir=str(tmp_path))

    assert (args.learning_rate, args.warmup_steps, args.max_length) == (2e-3, 100, 4096)
    assert (args.router_z_loss_coef, args.lm_z_loss_coef, args.router_aux_loss_coef) == (1e-3, 1e-5, 0.0)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.95, 0.0, 1.0)
    assert (args.lr_scheduler_type, args.telemetry) == ("cosine", False)


# What is kept.


def test_every_save_keeps_the_router_of_before_and_who_tuned_it(tuning, model, tmp_path):
    before = current_router(model)
    run = tuning(save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))

    for folder, steps in (("run/checkpoint-2", 2), ("final", 3)):
        base = read_router_base(tmp_path / folder)
        assert (base.proxies, base.steps) == (["code", "math"], steps)
        assert base.tokens > 0
        assert base.training["learning rate"] == 1e-2
        for name in NAMES:
            assert torch.equal(base.rows[name], before.rows[name])
            assert torch.equal(base.biases[name], before.biases[name])
    text = (tmp_path / "final" / BASE_RECORD).read_text()
    assert str(tmp_path) not in text
    assert not (tmp_path / "final" / "expert_training.json").exists()
    assert not (tmp_path / "final" / "training_args.bin").exists()
    assert json.loads((tmp_path / "final" / "frozen.json").read_text())["step"] == 3


def test_a_model_that_is_saved_by_itself_keeps_it_too_and_one_that_was_never_tuned_has_none(tuning, model, tmp_path):
    run = tuning()
    model.save_pretrained(tmp_path / "untuned")
    run.train()
    model.save_pretrained(tmp_path / "tuned")

    assert not (tmp_path / "untuned" / BASE_WEIGHTS).exists()
    assert read_router_base(tmp_path / "tuned").steps == 3


def test_rolled_back_the_model_is_what_it_was_bit_for_bit(tuning, model, tmp_path, input_ids):
    model.save_pretrained(tmp_path / "before")
    run = tuning()
    run.train()
    run.save_model(str(tmp_path / "tuned"))
    rollback_router(tmp_path / "tuned", tmp_path / "back", owner="math")
    before, tuned, back = (FlexOlmoForCausalLM.from_pretrained(tmp_path / n) for n in ("before", "tuned", "back"))

    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in before.state_dict().items())
    with torch.no_grad():
        assert torch.equal(before(input_ids).logits, back(input_ids).logits)
        assert not torch.equal(before(input_ids).logits, tuned(input_ids).logits)


def test_tuned_twice_it_goes_back_to_before_the_first_time(tuning, model, tmp_path):
    first = current_router(model)
    run = tuning(proxies(public=6, math=6))
    run.train()
    run.save_model(str(tmp_path / "once"))
    again = FlexOlmoForCausalLM.from_pretrained(tmp_path / "once")
    tuning(proxies(public=6, code=6), using=again).train()
    base = again.router_base

    assert (base.proxies, base.steps) == (["code", "math"], 6)
    assert all(torch.equal(base.rows[name], first.rows[name]) for name in NAMES)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does_and_keeps_the_first_router(tuning, model, tmp_path):
    start, first = state(model), current_router(model)
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tuning(**changes).train()
    whole, tokens = state(model), model.router_base.tokens
    unfreeze(model)
    model.load_state_dict(start)
    # Resuming puts the saved rows in; whatever this model came with is not what the run started from.
    model.router_base = None
    model.mixtures[0].gate.weight.data += 1
    run = tuning(**changes)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    assert run.state.global_step == 4
    for key, tensor in state(model).items():
        assert torch.equal(tensor, whole[key]), key
    assert all(torch.equal(model.router_base.rows[name], first.rows[name]) for name in NAMES)
    assert (model.router_base.steps, model.router_base.tokens) == (4, tokens)


def test_a_run_is_not_resumed_with_other_experts_proxies(tuning, model, tmp_path):
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tuning(**changes).train()
    with pytest.raises(ResumeMismatchError, match="proxies"):
        tuning(proxies(public=6, math=6), **changes).train(resume_from_checkpoint=True)


# What is refused.

REFUSED = {
    "one data set": (rows_of("p", 4), ConfigurationError, "by expert"),
    "none": ([], ConfigurationError, "by expert"),
    "no public data": (proxies(math=4), ConfigurationError, "no data for 'public'"),
    "an unknown expert": ({**proxies(), "maht": rows_of("m", 4)}, UnknownExpertError, "Did you mean 'math'"),
    "an empty source": ({**proxies(), "math": rows_of("m", 0)}, ConfigurationError, "'math' is empty"),
    "mixed kinds": (
        {**proxies(), "math": rows_of("m", 4).to_iterable_dataset()},
        ConfigurationError,
        "IterableDataset",
    ),
    "no text": ({**proxies(), "math": Dataset.from_list([{"body": "m"}])}, ConfigurationError, "needs 'text'"),
    "one token each": (
        {name: Dataset.from_list([{"input_ids": [5]}] * 4) for name in NAMES},
        ConfigurationError,
        "longer than one token",
    ),
    "lists": ({"public": [{"text": "p"}]}, ConfigurationError, "list"),
}


def test_rows_to_evaluate_on_are_looked_at_too(model, tokenizer, tmp_path):
    args = RouterSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, max_length=32)
    other = Dataset.from_list([{"body": "words"}])
    with pytest.raises(ConfigurationError, match="hold nothing to train on"):
        RouterSFTTrainer(model, args, proxies(), eval_dataset=other, processing_class=tokenizer)


@pytest.mark.parametrize(("data", "error", "says"), REFUSED.values(), ids=REFUSED.keys())
def test_data_that_cannot_be_meant_is_refused(tuning, data, error, says):
    with pytest.raises(error, match=says):
        tuning(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"router_aux_loss_coef": 0.01},
        {"router_z_loss_coef": -1.0},
        {"lm_z_loss_coef": -1.0},
        {"dataset_kwargs": {"skip_prepare_dataset": True}},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_settings_that_cannot_be_meant_are_refused(tmp_path, changes):
    with pytest.raises(ConfigurationError):
        RouterSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **changes)


def test_settings_of_another_class_are_refused(model, tmp_path):
    with pytest.raises(ConfigurationError, match="RouterSFTConfig"):
        RouterSFTTrainer(model, SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False), proxies())


def test_models_without_a_router_to_tune_are_refused(tuning, model, tokenizer, tmp_path):
    with pytest.raises(NotFlexOlmoError):
        tuning(using=dense_model())
    model.save_pretrained(tmp_path / "saved")
    without_public = FlexOlmoForCausalLM.from_pretrained(tmp_path / "saved", active_experts=["math", "code"])
    with pytest.raises(ExpertNotLoadedError, match="public"):
        freeze_all_but_routers(without_public)
    alone = FlexOlmoForCausalLM.from_pretrained(tmp_path / "saved", active_experts=["public"])
    with pytest.raises(ConfigurationError, match="only expert"):
        freeze_all_but_routers(alone)
    model.set_active_experts(["public", "math"])
    with pytest.raises(ConfigurationError, match="in force"):
        freeze_all_but_routers(model)


def test_a_loss_that_is_not_finite_stops_before_the_step(tuning, model):
    from flexolmo_hf.errors import NonFiniteLossError

    run = tuning()

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                model.model.norm.weight.data.fill_(float("nan"))

    run.add_callback(Spoil())
    with pytest.raises(NonFiniteLossError, match="step 2"):
        run.train()
