"""A run that was killed at any moment goes on as if it had not been, and refuses to go on as another."""

import json
import subprocess
import sys

import pytest
import torch

from flexolmo_hf.errors import NoCheckpointError, ResumeMismatchError
from flexolmo_hf.trainers.resume import is_complete, last_complete_checkpoint
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
