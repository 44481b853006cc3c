"""Trains in processes of its own that are killed at chosen moments, and resumes; prints what came of it as JSON.

Run by test_resume.py: ``python -m tests.trainers.killed_runs FOLDER``. Every run is a fork of this process, which has
imported everything and computed nothing yet.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import torch as safetensors_torch
from transformers import Trainer, TrainerCallback, set_seed

from flexolmo_hf import ExpertSFTConfig, ExpertSFTTrainer
from flexolmo_hf.trainers.proof import hash_tensors
from tests.conftest import byte_tokenizer
from tests.trainers.conftest import SHORT_RUN, TEXT, two_experts

STEPS = 6


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


class InStep(TrainerCallback):
    """Kills between the backward pass and the optimizer's step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 3:
            kill()


def kill_in_weights(trainer):
    original = safetensors_torch.save_file

    def half(tensors, filename, **kwargs):
        original(tensors, filename, **kwargs)
        if "checkpoint-4" in str(filename):
            os.truncate(filename, Path(filename).stat().st_size // 2)
            kill()

    import transformers.modeling_utils

    transformers.modeling_utils.safe_save_file = half


def kill_after_weights(trainer):
    def saved(self, output_dir):
        if output_dir.endswith("checkpoint-4"):
            kill()
        original(self, output_dir)

    original = Trainer._save_optimizer_and_scheduler
    Trainer._save_optimizer_and_scheduler = saved


def kill_in_state(trainer):
    from transformers.trainer import TrainerState

    original = TrainerState.save_to_json

    def half(self, json_path):
        original(self, json_path)
        if "checkpoint-4" in json_path:
            os.truncate(json_path, 40)
            kill()

    TrainerState.save_to_json = half


MOMENTS = {
    "in a step": lambda trainer: trainer.add_callback(InStep()),
    "in the weights": kill_in_weights,
    "after the weights": kill_after_weights,
    "in the state": kill_in_state,
}


def run(folder, resume, prepare=None):
    set_seed(0)
    tokenizer = byte_tokenizer()
    model = two_experts(tokenizer)
    saving = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    args = ExpertSFTConfig(**{**SHORT_RUN, **saving, "output_dir": str(folder)})
    trainer = ExpertSFTTrainer(
        model=model, args=args, train_dataset=Dataset.from_list(TEXT), processing_class=tokenizer
    )
    if prepare is not None:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=True if resume else None)
    return {
        "hash": hash_tensors(model.state_dict()),
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    }


def in_a_process(folder, resume, prepare=None):
    folder.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            (folder / "result.json").write_text(json.dumps(run(folder, resume, prepare)))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    result = folder / "result.json"
    return {
        "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
        **(json.loads(result.read_text()) if result.exists() else {}),
    }


def main(folder):
    found = {"uninterrupted": in_a_process(folder / "uninterrupted", False)}
    for moment, prepare in MOMENTS.items():
        place = folder / moment.replace(" ", "_")
        found[moment] = [in_a_process(place, False, prepare), in_a_process(place, True)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
