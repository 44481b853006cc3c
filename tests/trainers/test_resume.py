"""A run that was killed at any moment goes on as if it had not been, and refuses to go on as another."""

import json
import subprocess
import sys

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexolmo_hf.errors import FrozenMovedError, NoCheckpointError, ResumeMismatchError
from flexolmo_hf.trainers.resume import is_complete, last_complete_checkpoint, recognise_rows
from tests.test_documents import ROOT
from tests.trainers.conftest import TEXT
from tests.trainers.killed_runs import MOMENTS


def test_a_killed_run_resumes_to_the_bit(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tests.trainers.killed_runs", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    whole = found["uninterrupted"]
    assert not whole["killed"]
    for moment in MOMENTS:
        killed, resumed = found[moment]
        assert killed["killed"], moment
        assert "hash" not in killed
        if moment != "in a step":
            assert "checkpoint-4" in killed["checkpoints"], moment
        assert resumed["hash"] == whole["hash"], (moment, done.stderr)


def saved_run(trainer, **changes):
    run = trainer(TEXT, save_strategy="steps", save_steps=1, **changes)
    run.train()
    return run


def test_changed_settings_are_refused_by_name(trainer):
    saved_run(trainer)
    with pytest.raises(ResumeMismatchError, match="learning_rate was 0.01 and is 0.02; optim was"):
        trainer(TEXT, learning_rate=2e-2, optim="sgd").train(resume_from_checkpoint=True)


def test_what_does_not_change_the_steps_may_change(trainer):
    saved_run(trainer)
    trainer(TEXT, logging_steps=1, save_steps=7, dataloader_num_workers=0).train(resume_from_checkpoint=True)


CHANGES = {
    "neftune_noise_alpha": 5.0,
    "loss_type": "dft",
    "lr_scheduler_kwargs": {"num_cycles": 3},
    "optim_args": "x=1",
    "dataloader_drop_last": True,
    "packing_strategy": "wrapped",
    "router_lr_scale": 0.5,
    "train_router": False,
    "unfreeze": ["lm_head"],
}


@pytest.fixture
def saved(trainer, tmp_path):
    """A checkpoint of a run of two steps, without the trainer."""
    saved_run(trainer)
    return tmp_path / "run" / "checkpoint-1"


@pytest.mark.parametrize("name", CHANGES)
def test_every_setting_that_changes_a_step_is_compared(trainer, saved, name):
    with pytest.raises(ResumeMismatchError) as refused:
        trainer(TEXT, **{name: CHANGES[name]}).train(resume_from_checkpoint=str(saved))
    assert {"model", "training data"}.isdisjoint(changed := {change[0] for change in refused.value.changes})
    assert name in changed


def test_another_number_of_processes_is_refused(trainer, saved):
    then = json.loads((saved / "run.json").read_text())
    (saved / "run.json").write_text(json.dumps({**then, "processes": 2}))
    with pytest.raises(ResumeMismatchError, match="processes was 2 and is 1"):
        trainer(TEXT).train(resume_from_checkpoint=str(saved))


@pytest.mark.parametrize("rows", [TEXT[:-1], [*TEXT[:-1], {"text": "a very private sentence"}]], ids=["fewer", "other"])
def test_other_data_are_refused_and_never_written(trainer, saved, rows):
    with pytest.raises(ResumeMismatchError, match="training data was '[0-9a-f]{12}'") as refused:
        trainer(rows).train(resume_from_checkpoint=str(saved))
    assert "private" not in str(refused.value)
    assert ("training rows" in str(refused.value)) == (len(rows) != len(TEXT))
    assert "abc abc" not in (saved / "run.json").read_text()


def test_data_are_known_again_by_rows_spread_over_them(monkeypatch):
    rows = [{"input_ids": [number, number + 1], "score": number / 3} for number in range(40)]
    monkeypatch.setattr("flexolmo_hf.trainers.resume.SAMPLED_ROWS", 10)
    found = recognise_rows(Dataset.from_list(rows))
    assert recognise_rows(Dataset.from_list([{**row, "score": 0.5} for row in rows])) == found
    assert recognise_rows(Dataset.from_list(rows[1:] + rows[:1])) != found
    assert recognise_rows(rows) == {"training rows": 40}
    assert recognise_rows(Dataset.from_list(rows).to_iterable_dataset()) == {"training rows": None}


@pytest.mark.parametrize("name", ["optimizer.pt", "run.json", "rng_state.pth", "scheduler.pt"])
def test_a_checkpoint_that_lacks_a_part_is_refused_by_its_path_too(trainer, saved, name):
    (saved / name).unlink()
    with pytest.raises(NoCheckpointError, match="'run'. It holds checkpoint-1, not saved to the end"):
        trainer(TEXT).train(resume_from_checkpoint=str(saved))


def test_no_place_is_written_down(trainer, saved, tmp_path):
    assert str(tmp_path) not in (saved / "run.json").read_text()


def test_a_checkpoint_whose_frozen_weights_were_changed_is_refused_before_a_step(trainer, saved):
    (shared,) = saved.glob("model-shared-*.safetensors")
    with safe_open(shared, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(shared)
    tensors["model.embed_tokens.weight"][3] += 1
    save_file(tensors, shared, metadata)
    run = trainer(TEXT)
    with pytest.raises(FrozenMovedError, match=r"embed_tokens.* whoever wrote to its checkpoint"):
        run.train(resume_from_checkpoint=str(saved))
    assert run.state.global_step == 0


def test_the_folder_of_another_model_is_refused(trainer, model):
    saved_run(trainer)
    with torch.no_grad():
        model.model.embed_tokens.weight[3] += 1
    with pytest.raises(ResumeMismatchError, match="model was"):
        trainer(TEXT).train(resume_from_checkpoint=True)


def test_without_a_complete_checkpoint_there_is_nothing_to_resume(trainer, tmp_path):
    with pytest.raises(NoCheckpointError, match="'run'"):
        trainer(TEXT).train(resume_from_checkpoint=True)
    saved_run(trainer)
    run = tmp_path / "run"
    assert last_complete_checkpoint(run).name == "checkpoint-2"
    (run / "checkpoint-2" / "optimizer.pt").unlink()
    assert not is_complete(run / "checkpoint-2")
    assert last_complete_checkpoint(run).name == "checkpoint-1"
    (run / "checkpoint-1" / "trainer_state.json").write_text("{")
    with pytest.raises(NoCheckpointError, match="checkpoint-2, checkpoint-1, not saved to the end"):
        last_complete_checkpoint(run)


def test_checkpoints_are_ordered_by_step_not_by_name(trainer, tmp_path):
    saved_run(trainer)
    run = tmp_path / "run"
    (run / "checkpoint-2").rename(run / "checkpoint-10")
    (run / "checkpoint-x").mkdir()
    assert last_complete_checkpoint(run).name == "checkpoint-10"
