"""Run a model that is split over two processes as transformers plans it; started by torchrun."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import flexolmo_hf  # noqa: F401 (registers the architecture)

SETS = {"all": None, "two": ["public", "math"], "one": ["code"]}
ROWS = [["public"], ["public", "math"], ["news", "code"]]


def inputs():
    return torch.arange(2, 35).view(3, 11)


@torch.no_grad()
def logits_of(model):
    """Return the logits of every set, of rows with sets of their own, and what is generated."""
    found = {name: model(inputs(), active_experts=names).logits for name, names in SETS.items()}
    found["per row"] = model(inputs(), active_experts=ROWS).logits
    found["generated"] = model.generate(inputs(), max_new_tokens=5, do_sample=False, active_experts=["public", "news"])
    return found


def poison(model, names):
    """Fill these experts' shards and router rows with NaN."""
    for name in names:
        position = model.expert_position(name)
        for mixture, expert in zip(model.mixtures, model.expert_modules(name), strict=True):
            mixture.gate.weight.data[position] = float("nan")
            for parameter in expert.parameters():
                local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
                local.data.fill_(float("nan"))


def main(folder):
    model = AutoModelForCausalLM.from_pretrained(
        folder / "MODEL", distributed_config=DistributedConfig(tp_size=2, tp_plan="auto")
    )
    found = logits_of(model)
    expert = model.expert_modules("math")[0]
    found["elements"] = torch.tensor([expert.gate_proj.weight.to_local().numel(), expert.gate_proj.weight.numel()])
    partial = AutoModelForCausalLM.from_pretrained(
        folder / "MODEL",
        active_experts=["public", "math"],
        distributed_config=DistributedConfig(tp_size=2, tp_plan="auto"),
    )
    with torch.no_grad():
        found["loaded two"] = partial(inputs()).logits
    model.set_active_experts(["public", "math"])
    poison(model, ["code", "news"])
    with torch.no_grad():
        found["poisoned two"] = model(inputs()).logits
        found["poisoned all"] = model(inputs(), active_experts=model.expert_names).logits
    save_file(
        {name: tensor.contiguous() for name, tensor in found.items()}, folder / f"rank{dist.get_rank()}.safetensors"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    dist.destroy_process_group()
