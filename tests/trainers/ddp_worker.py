"""Train with `ExpertSFTTrainer` as one of several processes, started by torchrun, or called for a run in one."""

import json
import sys
from pathlib import Path

from datasets import Dataset
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer

from flexolmo_hf import ExpertSFTConfig, ExpertSFTTrainer, FlexOlmoForCausalLM
from flexolmo_hf.trainers.proof import frozen_tensors, hash_tensors

#: Rows of different lengths: what each process pads and counts differs.
TEXT = [{"text": f"row {number} " + "abc " * (number * 5 % 13)} for number in range(24)]
RUNS = {
    "sgd": {"optim": "sgd", "learning_rate": 0.5, "gradient_checkpointing": False},
    "adamw, accumulated": {"optim": "adamw_torch", "learning_rate": 1e-3, "gradient_accumulation_steps": 2},
}
SEQUENCES_PER_MICRO_STEP = 4


def settings(folder, processes, **changes):
    return ExpertSFTConfig(
        **{
            "expert": "math",
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": SEQUENCES_PER_MICRO_STEP // processes,
            "warmup_steps": 0,
            "weight_decay": 0.1,
            "max_length": 48,
            # Large enough to show if they are not normalised over all processes.
            "router_z_loss_coef": 0.1,
            "lm_z_loss_coef": 0.01,
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "ddp_find_unused_parameters": False,
            **changes,
        }
    )


def train(folder, name, processes, *, resume=None, leave=None, callbacks=()):
    """Run one of `RUNS` and leave what this process has: all tensors, hashes of the frozen ones, the losses."""
    model = FlexOlmoForCausalLM.from_pretrained(folder / "START")
    out = folder / f"{name} in {processes}"
    trainer = ExpertSFTTrainer(
        model=model,
        args=settings(out, processes, **RUNS[name]),
        train_dataset=Dataset.from_list(TEXT),
        processing_class=AutoTokenizer.from_pretrained(folder / "START"),
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(out / resume))
    assert trainer.args.world_size == processes
    rank = trainer.args.process_index
    out = folder / f"{leave or name} in {processes}"
    out.mkdir(exist_ok=True)
    sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
    state = {key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in model.state_dict().items()}
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, out / f"rank{rank}.safetensors")
    facts = {
        "frozen": hash_tensors(frozen_tensors(model)),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "wrapper": type(trainer.model_wrapped).__name__,
        "find unused": getattr(trainer.model_wrapped, "find_unused_parameters", None),
        "sharded": sharded,
    }
    (out / f"rank{rank}.json").write_text(json.dumps(facts))
    trainer.save_model(str(out / "final"))


if __name__ == "__main__":
    for run in RUNS:
        train(Path(sys.argv[1]), run, 2)
