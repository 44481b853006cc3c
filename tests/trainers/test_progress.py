"""A long run shows how fast it is, what the expert gets of the routing, and where its row and bias are."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import ProgressCallback, TrainerState

from flexolmo_hf import FlexOlmoForCausalLM, freeze_except
from flexolmo_hf.errors import NonFiniteLossError
from flexolmo_hf.trainers.progress import ExpertProgress, ExpertProgressBar
from tests.modeling.test_expert_sets import named_model
from tests.trainers.conftest import TEXT
from tests.trainers.test_expert import Watch

ONE = "loss 5.568, share 0.27, bias -0.42, row 0.013"
ALL = "share 0.60/0.40, bias 0.00/-1.00"


def test_the_log_has_the_experts_figures(trainer, model):
    run = trainer(TEXT, logging_steps=1, max_steps=3)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(entries) == 3
    for entry in entries:
        assert entry["tokens_per_second"] > 0
        assert 0 < entry["routing_share"] < 1
        assert entry["row_distance"] > 0
        assert -1.1 < entry["router_bias"] < -0.9
    # With equal rows and a bias of -1, the new expert starts with 27 % of the routing.
    assert entries[0]["routing_share"] == pytest.approx(math.exp(-1) / (1 + math.exp(-1)), abs=1e-3)


def test_shares_and_distances_are_what_they_say(input_ids):
    model = named_model(router_bias=True)
    freeze_except(model, "math")
    progress = ExpertProgress(model, "math")
    logits = [torch.randn(33, 4) for _ in model.mixtures]
    progress.count(33, logits)
    with torch.no_grad():
        for mixture in model.mixtures:
            mixture.gate.trained_row += 0.5
    found = progress.figures()
    at = model.expert_position("math")
    expected = torch.stack([layer.softmax(-1)[:, at].mean() for layer in logits]).mean()
    assert found["routing_share"] == pytest.approx(expected.item(), abs=1e-4)
    assert found["row_distance"] == pytest.approx(0.5 * math.sqrt(64), rel=1e-5)
    assert "routing_share" not in progress.figures()


def test_the_bar_shows_the_newest_figures(trainer, capsys):
    run = trainer(TEXT, logging_steps=1, disable_tqdm=False)
    bars = [callback for callback in run.callback_handler.callbacks if isinstance(callback, ProgressCallback)]
    assert [type(bar) for bar in bars] == [ExpertProgressBar]
    run.train()
    newest = [entry for entry in run.state.log_history if "loss" in entry][-1]
    shown = (
        f"loss {newest['loss']:.4g}, tok/s {newest['tokens_per_second']:.0f}, share {newest['routing_share']:.2f}, "
        f"bias {newest['router_bias']:.2f}, row {newest['row_distance']:.2g}]"
    )
    assert shown in capsys.readouterr().err


@pytest.mark.parametrize(
    ("logs", "shown"),
    [
        ({"loss": 5.56789, "routing_share": 0.2689, "router_bias": -0.4219, "row_distance": 0.01281}, ONE),
        (
            {"routing_share_public": 0.6, "routing_share_math": 0.4, "router_bias_public": 0.0, "router_bias_math": -1},
            ALL,
        ),
        ({"train_loss": 5.5}, None),
        ({}, None),
    ],
    ids=["one expert", "all experts", "none of these figures", "nothing"],
)
def test_the_bar_says_the_figures_of_one_expert_or_of_all(logs, shown):
    bar, texts = ExpertProgressBar(), []
    bar.training_bar = SimpleNamespace(set_postfix_str=texts.append)
    bar.on_log(None, TrainerState(is_world_process_zero=True), None, logs=logs)
    assert texts == ([] if shown is None else [shown])


def test_trackers_get_the_figures(trainer, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is optional")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(TEXT, logging_steps=1, report_to="tensorboard", max_steps=3)
    run.train()
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events)).Reload()
    assert [event.step for event in written.Scalars("train/routing_share")] == [1, 2, 3]
    assert {"train/tokens_per_second", "train/router_bias", "train/row_distance"} <= set(written.Tags()["scalars"])


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(trainer, model, tmp_path):
    run = trainer(TEXT, max_steps=4, save_strategy="steps", save_steps=1, logging_steps=1)
    seen = {}

    def look():
        if run.state.global_step == 2:
            seen.update({name: value.clone() for name, value in model.state_dict().items()})
            model.expert_modules("math")[0].up_proj.register_forward_hook(lambda *call: call[-1] * float("nan"))

    run.add_callback(Watch(look))
    with pytest.raises(NonFiniteLossError, match="step 3, in batch 3 .*'checkpoint-2'"):
        run.train()
    assert all(torch.equal(value, seen[name]) for name, value in model.state_dict().items())
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(trainer, model, tmp_path, max_grad_norm):
    run = trainer(
        TEXT, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=1, max_grad_norm=max_grad_norm
    )
    spoilt = model.expert_modules("math")[0].up_proj.weight
    spoilt.register_hook(lambda gradient: gradient * (float("nan") if run.state.global_step == 1 else 1))
    with pytest.raises(NonFiniteLossError, match="gradient is not finite at step 2, in batch 2 .*'checkpoint-1'"):
        run.train()
    kept = FlexOlmoForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1").state_dict()
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())


def test_a_scaler_leaves_out_such_steps_itself(trainer, model, monkeypatch):
    run = trainer(TEXT)
    model.expert_modules("math")[0].up_proj.weight.register_hook(lambda gradient: gradient * float("nan"))
    run.current_gradient_accumulation_steps = 1
    run.training_step(model.train(), next(iter(run.get_train_dataloader())))
    monkeypatch.setattr(run.accelerator, "scaler", object())
    assert run._get_grad_norm(model).isnan()
    monkeypatch.setattr(run.accelerator, "scaler", None)
    with pytest.raises(NonFiniteLossError):
        run._get_grad_norm(model)


def test_batches_are_counted_on_after_a_resume(trainer, model):
    accumulated = {"save_strategy": "steps", "gradient_accumulation_steps": 2, "max_steps": 4}
    run = trainer(TEXT, save_steps=2, **accumulated)
    run.add_callback(Watch(lambda: setattr(run.control, "should_training_stop", run.state.global_step == 3)))
    run.train()
    again = trainer(TEXT, save_steps=2, **accumulated)
    again.add_callback(Watch(lambda: model.model.norm.weight.data.fill_(float("nan"))))
    with pytest.raises(NonFiniteLossError, match=r"step 4, in batch 7 .*'checkpoint-2'"):
        again.train(resume_from_checkpoint=str(Path(run.args.output_dir) / "checkpoint-2"))


def test_nothing_is_printed_of_the_text(trainer, capfd):
    run = trainer([{"text": "a very private sentence"}] * 24, logging_steps=1)
    run.train()
    shown = capfd.readouterr()
    assert "private" not in shown.out + shown.err
