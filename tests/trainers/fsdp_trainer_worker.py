"""Train with `ExpertSFTTrainer` under accelerate's FSDP2 in two processes; started by torchrun.

accelerate shards on accelerators only and runs DDP on a CPU without a word; here it is told that this is one.
"""

import json
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import state as accelerate_state
from accelerate.utils import DistributedType
from transformers import TrainerCallback

from flexolmo_hf.errors import FrozenMovedError
from tests.trainers import ddp_worker

ALIKE = "adamw, accumulated"
#: A run of `ddp_worker`, sharded.
SHARDED = {**ddp_worker.RUNS[ALIKE], "fsdp": True, "save_strategy": "steps", "save_steps": 2}
KINDS = {"fsdp full": "FULL_STATE_DICT", "fsdp shards": "SHARDED_STATE_DICT"}


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
            (frozen,) = (
                p for name, p in model.named_parameters() if name.endswith("layers.0.mlp.experts.0.up_proj.weight")
            )
            frozen.to_local().data.view(-1)[0] += 1


def train_spoilt(folder, name):
    """Leave what this process was told of a run in which something frozen moves."""
    spoilt = f"{name} spoilt"
    ddp_worker.RUNS[spoilt] = ddp_worker.RUNS[name]
    said = None
    try:
        ddp_worker.train(folder, spoilt, 2, callbacks=[Spoil()])
    except FrozenMovedError as error:
        said = error.names
    (folder / f"{spoilt} {dist.get_rank()}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    let_accelerate_shard_on_a_cpu()
    folder = Path(sys.argv[1])
    for name, kind in KINDS.items():
        ddp_worker.RUNS[name] = {**SHARDED, "fsdp_config": {"fsdp_version": 2, "state_dict_type": kind}}
        ddp_worker.train(folder, name, 2)
        ddp_worker.train(folder, name, 2, resume="checkpoint-2", leave=f"{name} resumed")
        train_spoilt(folder, name)
