"""Train one expert of a model that is sharded over two processes; started by torchrun, or called for a run in one."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from flexolmo_hf import FlexOlmoForCausalLM, freeze_except
from flexolmo_hf.trainers.freezing import project_biases
from flexolmo_hf.trainers.proof import frozen_tensors, hash_tensors
from flexolmo_hf.trainers.sharded import expert_state

FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Gathered(TorchDispatchMode):
    """Counts the numbers that processes gather from each other."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if "all_gather" in str(func):
            self.numbers += result.numel()
        return result


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def built(folder):
    model = FlexOlmoForCausalLM.from_pretrained(folder / "START").train()
    freeze_except(model, "math")
    if dist.is_initialized():
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard([model.model.norm, model.lm_head])
        fully_shard(model)
    # A large epsilon: where a gradient is nearly 0, AdamW would else make a whole step of its rounding.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1, eps=1e-4)


def batch(step):
    ids = torch.randint(2, 250, (4, 24), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    labels[0, : 5 * step] = -100
    return ids, labels


def train(model, optimizer, steps):
    for step in steps:
        ids, labels = (rows.chunk(processes())[rank()] for rows in batch(step))
        everyone = (batch(step)[1][:, 1:] != -100).sum()
        logits = model(ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / everyone
        # Gradients are averaged over processes, and the loss is that of all tokens.
        (loss * processes()).backward()
        optimizer.step()
        optimizer.zero_grad()
        project_biases(model)


def whole_state(model):
    if not dist.is_initialized():
        return model.state_dict()
    return get_model_state_dict(model, options=FULL)


def sharded_run(folder):
    """Train, save in shards after two steps, and restore into a fresh model that goes on."""
    model, optimizer = built(folder)
    before = hash_tensors(frozen_tensors(model))
    train(model, optimizer, [1, 2])
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(states, checkpoint_id=str(folder / "shards"))
    train(model, optimizer, [3])
    whole = whole_state(model)
    with Gathered() as one_expert:
        expert = expert_state(model, "math")
    with Gathered() as everything:
        whole_state(model)

    again, optimizer_again = built(folder)
    states = dict(zip(("model", "optimizer"), get_state_dict(again, optimizer_again), strict=True))
    dcp.load(states, checkpoint_id=str(folder / "shards"))
    set_state_dict(again, optimizer_again, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    train(again, optimizer_again, [3])
    resumed = whole_state(again)

    fresh, _ = built(folder)
    # A copy: what is handed over is changed on the way.
    given = dict(whole) if rank() == 0 else {}
    set_model_state_dict(fresh, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    reloaded = whole_state(fresh)
    if rank() == 0:
        for name, tensors in {"whole": whole, "expert": expert, "resumed": resumed, "reloaded": reloaded}.items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, folder / f"{name}.safetensors")
    facts = {
        "frozen before": before,
        "frozen after": hash_tensors(frozen_tensors(model)),
        "gathered for one expert": one_expert.numbers,
        "gathered for everything": everything.numbers,
        "optimizer": sum(s["exp_avg"].to_local().numel() for s in optimizer.state.values()),
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    (folder / f"shards{rank()}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    sharded_run(Path(sys.argv[1]))
    dist.destroy_process_group()
