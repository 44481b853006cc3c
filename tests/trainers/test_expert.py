"""Training with TRL moves one expert on every kind of data, resumes, and leaves nothing private behind."""

import json

import pytest
import torch
import trl.trainer.base_trainer
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from flexolmo_hf import ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM
from flexolmo_hf.errors import ConfigurationError, InvalidExpertNameError, NotFlexOlmoError, UnknownExpertError
from tests.conftest import dense_model
from tests.trainers.conftest import TEXT
from tests.trainers.test_freezing import belongs_to, state

TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
DATA = {
    "text": (TEXT, {}),
    "packed text": (TEXT, {"packing": True}),
    "wrapped text": (TEXT, {"packing": True, "packing_strategy": "wrapped"}),
    "prompt and completion": ([{"prompt": f"{n} + 1 =", "completion": f" {n + 1}"} for n in range(24)], {}),
    "messages": (
        [
            {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "yes"}]}
            for n in range(24)
        ],
        {},
    ),
    "accumulated": (TEXT, {"gradient_accumulation_steps": 3}),
    "without checkpointing": (TEXT, {"gradient_checkpointing": False}),
    "bf16 autocast": (TEXT, {"bf16": True}),
    "without z-losses": (TEXT, {"router_z_loss_coef": 0.0, "lm_z_loss_coef": 0.0}),
}


class Watch(TrainerCallback):
    """Calls something after every step."""

    def __init__(self, look):
        self.look = look

    def on_step_end(self, args, state, control, **kwargs):
        self.look()


@pytest.mark.parametrize(("rows", "changes"), DATA.values(), ids=DATA.keys())
def test_training_moves_exactly_one_expert_its_row_and_its_bias(trainer, model, tokenizer, rows, changes):
    tokenizer.chat_template = TEMPLATE
    before = state(model)
    run = trainer(rows, **changes)
    run.train()
    after = state(model)

    for key in before:
        if belongs_to(key, 1):
            assert not torch.equal(after[key], before[key]), key
        elif ".mlp.gate." in key:
            assert torch.equal(after[key][0], before[key][0]), key
            assert not torch.equal(after[key][1], before[key][1]), key
        else:
            assert torch.equal(after[key], before[key]), key


def test_optimizer_state_exists_for_the_expert_alone(trainer, model):
    run = trainer(TEXT)
    run.train()
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    assert {id(parameter) for parameter in run.optimizer.state} == trained
    assert len(trained) == 2 * (3 + 2)


def test_the_loss_is_the_plain_loss_and_both_z_losses(trainer, model):
    run = trainer(TEXT, gradient_checkpointing=False, router_z_loss_coef=0.5, lm_z_loss_coef=0.25)
    batch = next(iter(run.get_train_dataloader()))
    model.train()
    found = run.compute_loss(model, dict(batch), num_items_in_batch=None)
    output = model(
        batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True, use_cache=False
    )
    labels = batch["labels"][:, 1:]
    counted = labels != -100
    logits = output.logits[:, :-1].float()
    plain = torch.nn.functional.cross_entropy(logits[counted], labels[counted])
    lm_z = logits.logsumexp(-1).square()[counted].mean()
    kept = batch["attention_mask"].flatten().bool()
    router_z = torch.stack([layer[kept].logsumexp(-1).square().mean() for layer in output.router_logits]).mean()

    torch.testing.assert_close(found, plain + 0.5 * router_z + 0.25 * lm_z, atol=1e-4, rtol=1e-5)


def test_the_output_z_loss_is_normalised_like_the_loss_it_joins(trainer, model):
    run = trainer(TEXT, gradient_checkpointing=False, router_z_loss_coef=0.0, lm_z_loss_coef=0.25)
    batch = next(iter(run.get_train_dataloader()))
    model.train()
    tokens = (batch["labels"][:, 1:] != -100).sum()
    alone = run.compute_loss(model, dict(batch), num_items_in_batch=None)
    as_half_of_a_step = run.compute_loss(model, dict(batch), num_items_in_batch=2 * tokens)

    torch.testing.assert_close(as_half_of_a_step, alone / 2)


@pytest.mark.parametrize("changes", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointed"])
def test_the_router_z_loss_reaches_the_row(trainer, model, changes):
    gradients = []
    for coefficient in (0.0, 10.0):
        run = trainer(
            TEXT, router_z_loss_coef=coefficient, lm_z_loss_coef=0.0, **{"gradient_checkpointing": False, **changes}
        )
        if changes:
            model.gradient_checkpointing_enable()
        model.train()
        model.zero_grad()
        run.compute_loss(model, dict(next(iter(run.get_train_dataloader())))).backward()
        gradients.append(model.mixtures[0].gate.trained_row.grad.clone())

    assert not torch.allclose(*gradients)


def test_evaluation_reports_the_plain_loss(trainer, model):
    run = trainer(TEXT, eval_rows=TEXT[:8], lm_z_loss_coef=100.0)
    plain = trainer(TEXT, eval_rows=TEXT[:8], lm_z_loss_coef=0.0, router_z_loss_coef=0.0)

    assert run.evaluate()["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])


def test_no_load_balancing_loss_is_added_and_the_configuration_stays_as_it_was(trainer, model):
    run = trainer(TEXT)

    assert not run.aux_loss_enabled
    assert model.config.output_router_logits is False


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(trainer, model, tmp_path):
    start = state(model)
    changes = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}
    trainer(TEXT, **changes).train()
    whole = state(model)
    model.load_state_dict(start)
    run = trainer(TEXT, **changes)
    run.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))

    assert run.state.global_step == 4
    for key, tensor in state(model).items():
        assert torch.equal(tensor, whole[key]), key


def test_a_saved_run_loads_as_a_model_and_holds_neither_a_pickled_record_nor_a_card(
    trainer, model, tmp_path, input_ids
):
    run = trainer(TEXT, save_strategy="steps", save_steps=2)
    run.train()
    run.save_model(str(tmp_path / "final"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    names = {path.name for path in tmp_path.rglob("*")}

    with torch.no_grad():
        assert torch.equal(again(input_ids).logits, model.eval()(input_ids).logits)
    assert "training_args.bin" not in names
    assert "README.md" not in names
    assert not list((tmp_path / "final").glob("*.bin"))


def test_the_training_record_says_how_and_nothing_of_what_or_where(trainer, tmp_path):
    run = trainer(TEXT, learning_rate=3e-3)
    run.train()
    run.save_model(str(tmp_path / "final"))
    text = (tmp_path / "final" / "expert_training.json").read_text()
    record = json.loads(text)["training"]

    assert record["learning rate"] == 3e-3
    assert record["steps"] == 2
    assert record["tokens"] > 0
    assert "row" not in text.replace("router", "")
    assert str(tmp_path) not in text


def test_the_held_out_loss_is_recorded_if_it_was_measured(trainer):
    run = trainer(TEXT, eval_rows=TEXT[:8])
    assert run.evaluation_record() == {}
    loss = run.evaluate()["eval_loss"]

    assert run.evaluation_record() == {"held-out loss (nats per token)": round(loss, 4)}


@pytest.mark.parametrize("telemetry", [False, True])
def test_telemetry_is_sent_only_when_it_is_turned_on(trainer, monkeypatch, telemetry):
    sent = []
    monkeypatch.setattr(trl.trainer.base_trainer, "send_telemetry", lambda **kwargs: sent.append(kwargs))
    monkeypatch.delenv("CI", raising=False)
    trainer(TEXT, telemetry=telemetry)

    assert bool(sent) is telemetry


def test_a_path_is_loaded_with_this_packages_class_and_not_the_stock_one(trainer, model, tmp_path):
    model.save_pretrained(tmp_path / "start")

    assert type(trainer(TEXT, using=str(tmp_path / "start")).model) is FlexOlmoForCausalLM


def test_the_papers_values_are_the_defaults(tmp_path):
    args = ExpertSFTConfig(expert="math", output_dir=str(tmp_path))

    assert (args.router_z_loss_coef, args.lm_z_loss_coef, args.router_aux_loss_coef) == (1e-3, 1e-5, 0.0)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (9e-4, 0.9, 0.95)
    assert (args.weight_decay, args.max_grad_norm, args.lr_scheduler_type) == (0.0, 1.0, "cosine")


REFUSED = {
    "no expert": ({"expert": ""}, ConfigurationError),
    "a path as name": ({"expert": "a/b"}, InvalidExpertNameError),
    "load balancing": ({"router_aux_loss_coef": 0.01}, ConfigurationError),
    "a negative weight": ({"lm_z_loss_coef": -1.0}, ConfigurationError),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        ConfigurationError,
    ),
}


@pytest.mark.parametrize(("changes", "error"), REFUSED.values(), ids=REFUSED.keys())
def test_settings_that_cannot_be_meant_are_refused(settings, changes, error):
    with pytest.raises(error):
        settings(**changes)


def test_an_unknown_expert_is_refused_before_any_data_is_prepared(trainer):
    with pytest.raises(UnknownExpertError, match="Did you mean 'math'"):
        trainer([{"not": "text"}], expert="maht")


def test_a_model_of_another_architecture_is_refused(trainer):
    with pytest.raises(NotFlexOlmoError):
        trainer(TEXT, using=dense_model())


def test_settings_of_another_class_are_refused(model, tmp_path):
    with pytest.raises(ConfigurationError, match="ExpertSFTConfig"):
        ExpertSFTTrainer(model=model, args=trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False))


def test_freezing_works_with_any_trainer(model, tokenizer, tmp_path):
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, TrainingArguments

    from flexolmo_hf import freeze_except

    before = state(model)
    freeze_except(model, "math")
    rows = Dataset.from_list([dict(tokenizer("abc" * 5)) for _ in range(8)])
    args = TrainingArguments(
        str(tmp_path), max_steps=2, use_cpu=True, weight_decay=0.1, save_strategy="no", disable_tqdm=True
    )
    Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    ).train()
    moved = {key for key, tensor in state(model).items() if not torch.equal(tensor, before[key])}

    assert moved == {key for key in before if belongs_to(key, 1) or ".mlp.gate." in key}


def test_a_bias_that_training_pushes_up_stays_at_zero_and_below(trainer, model):
    for mixture in model.mixtures:
        mixture.gate.bias.data[1] = -1e-4
    run = trainer(TEXT, max_steps=6, learning_rate=5e-2, weight_decay=0.0, lr_scheduler_type="constant")
    seen = []
    run.add_callback(Watch(lambda: seen.extend(m.gate.trained_bias.item() for m in model.mixtures)))
    run.train()

    assert max(seen) == 0.0
