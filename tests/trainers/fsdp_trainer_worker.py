"""Train with `ExpertSFTTrainer` under accelerate's FSDP2 in two processes; started by torchrun.

accelerate shards on accelerators only and runs DDP on a CPU without a word; here it is told that this is one.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from transformers import TrainerCallback

from flexolmo_hf.errors import FrozenMovedError
from tests.trainers import ddp_worker

ALIKE = "adamw, accumulated"
#: A run of `ddp_worker`, sharded.
SHARDED = {**ddp_worker.RUNS[ALIKE], "fsdp": True, "save_strategy": "steps", "save_steps": 2}
KINDS = {"fsdp full": "FULL_STATE_DICT", "fsdp shards": "SHARDED_STATE_DICT"}

FROZEN = "model.layers.0.mlp.experts.0.up_proj.weight"


def let_accelerate_shard_on_a_cpu():
    """Let the process group count as one of GPUs where it is decided whether to shard."""
    before = accelerate_state.PartialState.__init__

    def prepared(self, *args, **kwargs):
        before(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate_state.PartialState.__init__ = prepared


class Spoil(TrainerCallback):
    """Moves a number of a frozen tensor after the first step, in the second process alone."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if dist.get_rank() == 1 and state.global_step == 1:
            (frozen,) = (parameter for name, parameter in model.named_parameters() if name.endswith(FROZEN))
            frozen.to_local().data.view(-1)[0] += 1


def told(run):
    """Return which frozen tensors a run said had moved."""
    try:
        run()
    except FrozenMovedError as error:
        return error.names
    return None


def spoil_saved(checkpoint):
    """Move a number of a frozen tensor in the files of a checkpoint."""
    whole, shards = checkpoint / "pytorch_model_fsdp.bin", checkpoint / "pytorch_model_fsdp_0"
    if shards.is_dir():
        dcp_to_torch_save(shards, whole)
    state = torch.load(whole)
    (state["model"] if shards.is_dir() else state)[FROZEN].view(-1)[0] += 1
    torch.save(state, whole)
    if shards.is_dir():
        shutil.rmtree(shards)
        torch_save_to_dcp(whole, shards)
        whole.unlink()


def train_spoilt(folder, name):
    """Leave what this process was told of a run in which something frozen moves, and of one whose checkpoint has."""
    spoilt = f"{name} spoilt"
    ddp_worker.RUNS[spoilt] = ddp_worker.RUNS[name]
    found = {"in a step": told(lambda: ddp_worker.train(folder, spoilt, 2, callbacks=[Spoil()]))}
    copy = folder / f"{spoilt} in 2" / "checkpoint-2"
    if dist.get_rank() == 0:
        shutil.copytree(folder / f"{name} in 2" / "checkpoint-2", copy)
        spoil_saved(copy)
    dist.barrier()
    found["on disk"] = told(lambda: ddp_worker.train(folder, spoilt, 2, resume="checkpoint-2"))
    (folder / f"{spoilt} {dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    let_accelerate_shard_on_a_cpu()
    folder = Path(sys.argv[1])
    for name, kind in KINDS.items():
        ddp_worker.RUNS[name] = {**SHARDED, "fsdp_config": {"fsdp_version": 2, "state_dict_type": kind}}
        ddp_worker.train(folder, name, 2)
        ddp_worker.train(folder, name, 2, resume="checkpoint-2", leave=f"{name} resumed")
        train_spoilt(folder, name)
