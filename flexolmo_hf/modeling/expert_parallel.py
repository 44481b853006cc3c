"""Whole experts on several processes: each one holds and runs its own, and one sum for each layer joins the outputs.

Routers, attention and everything else are on every process, so all of them route every token alike. An expert of
another process keeps its name, its router row and its place, but has no weights here and adds nothing to the sum.

Shape letters: B batch, T tokens, H hidden.
"""

import hashlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers.distributed import DistributedConfig
from transformers.distributed.expert_parallel import ExpertParallelLayer, apply_expert_parallelism
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.files.hashing import hash_tensor
from flexolmo_hf.modeling.selection import Selection


class ExpertElsewhere(nn.Module):
    """An expert that another process holds."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Leave the output to the other process, ``(..., H)`` to ``(..., H)``."""
        return torch.zeros_like(x)


class SpreadExperts(nn.ModuleDict):
    """The experts of a layer of which each process holds its own."""


class WholeExperts(ExpertParallelLayer):
    """Differs from upstream's styles in that it cuts no tensor: it leaves whole modules to other processes."""

    def install_forward(self, module: Any, mesh: Any) -> Any:
        """Keep this process's experts of a mixture, and sum its output over the processes."""
        own = _share_of(list(module.experts), mesh.get_local_rank(), mesh.size())
        experts = {key: expert if key in own else ExpertElsewhere() for key, expert in module.experts.items()}
        module.experts = SpreadExperts(experts)
        group = mesh.get_group()

        def sum_outputs(mixture: Any, _: Any, output_BTH: torch.Tensor) -> torch.Tensor:
            if torch.is_grad_enabled() and _any_learns(output_BTH, group):
                # What comes back of the gradient would be this process's part alone.
                refuse_spread([mixture], "compute gradients")
            output_BTH = output_BTH.contiguous()
            dist.all_reduce(output_BTH, group=group)
            return output_BTH

        module.register_forward_hook(sum_outputs)
        return module


ALL_PARALLEL_STYLES.register("whole_experts", WholeExperts())


class ExpertParallel:
    """Loading with ``DistributedConfig(ep_size=...)``, and what such a model refuses."""

    mixtures: Any

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """Apply upstream's plans, and leave other processes' experts to them."""
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)  # type: ignore[misc]
        if mesh_manager is not None and distributed_config.ep_size > 1:
            # Upstream applies no plan but those that exchange tokens.
            plan = model._expand_parallel_plan(model.ep_plan)
            apply_expert_parallelism(model, mesh_manager.get_mesh("ep"), mesh_manager.get_mesh("tp"), plan)
            model._expect_absent_experts(distributed_config)
        return model

    def _resolve_parallel_plans(self, distributed_config: Any) -> Any:
        if distributed_config.ep_size > 1 and distributed_config.tp_plan == {}:
            # Experts alone are spread. TODO(transformers > 5.23): it asks for a plan to slice by, unlike its own docs.
            self.tp_plan: dict[str, str] = {}
            return {}, {}, {}
        return super()._resolve_parallel_plans(distributed_config)  # type: ignore[misc]

    def _prepare_model_inputs(self, *args: Any) -> Any:
        # Decoding of every mode starts here. A process that chose another token, or stopped earlier, would leave the
        # others waiting for its part of a sum, or give them that of another text.
        inputs, name, others = super()._prepare_model_inputs(*args)  # type: ignore[misc]
        if is_spread(self.mixtures):
            device = self.device  # type: ignore[attr-defined]
            _refuse_different(inputs, others, device)
            _share_random_state(device)
        return inputs, name, others

    def train(self, mode: bool = True) -> Any:
        """Set the mode, as upstream.

        Raises:
            ConfigurationError: If the experts are spread over processes, which is for inference.
        """
        if mode:
            refuse_spread(self.mixtures, "be trained")
        return super().train(mode)  # type: ignore[misc]


def held_indices(config: FlexOlmoConfig, distributed_config: Any = None) -> list[int]:
    """Return the checkpoint indices of the experts that this process holds: of N processes, every N-th expert.

    Args:
        config: The model's configuration.
        distributed_config: As `from_pretrained` takes it.

    Raises:
        ConfigurationError: If these experts cannot be spread as it says.
    """
    if isinstance(distributed_config, dict):
        distributed_config = DistributedConfig.from_dict(distributed_config)
    if distributed_config is None or distributed_config.ep_size == 1:
        return config.loaded_indices
    _check(config, distributed_config)
    # torchrun tells the rank before the processes know each other.
    rank = dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))
    return _share_of(config.loaded_indices, rank, distributed_config.ep_size)


def is_spread(mixtures: Any) -> bool:
    """Tell whether the experts of these mixtures are spread over processes."""
    return isinstance(mixtures[0].experts, SpreadExperts)


def refuse_spread(mixtures: Any, what: str) -> None:
    """Refuse what needs every expert in one process.

    Args:
        mixtures: The model's mixtures.
        what: What was asked for, after "it cannot".

    Raises:
        ConfigurationError: If the experts are spread over processes.
    """
    if is_spread(mixtures):
        raise ConfigurationError(
            f"Each process holds only its own experts of this model, which is for inference: it cannot {what}.",
            "Load it without ep_size.",
        )


def _any_learns(output_BTH: torch.Tensor, group: Any) -> bool:
    """Tell whether this output depends on what learns in any process: all of them refuse, or none."""
    learning = torch.tensor(int(output_BTH.requires_grad), device=output_BTH.device)
    dist.all_reduce(learning, group=group)
    return bool(learning)


def _refuse_different(inputs: torch.Tensor, others: dict[str, Any], device: torch.device) -> None:
    given = {name: hash_tensor(value) for name, value in others.items() if isinstance(value, torch.Tensor)}
    selection = others.get("active_experts")
    given["sets"] = str(selection.names if isinstance(selection, Selection) else selection)
    text = str([hash_tensor(inputs), sorted(given.items())])
    digest = torch.tensor([*hashlib.sha256(text.encode()).digest()], device=device)
    # The largest and the smallest, exchanged at once: every process comes to the same answer.
    extremes = torch.stack([digest, -digest])
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
    if not torch.equal(extremes[0], -extremes[1]):
        raise ConfigurationError(
            "The processes were given different inputs or sets of experts to generate with, but work on one batch.",
            "Give all of them the same prompts, masks and active_experts.",
        )


def _share_random_state(device: torch.device) -> None:
    """Let every process draw what the first one draws."""

    def of_the_first(state: torch.Tensor) -> torch.Tensor:
        state = state.to(device)
        dist.broadcast(state, src=0)
        return state.cpu()

    torch.set_rng_state(of_the_first(torch.get_rng_state()))
    if device.type != "cpu":
        accelerator = torch.get_device_module(device)
        accelerator.set_rng_state(of_the_first(accelerator.get_rng_state(device)), device)


def _share_of(experts: list[Any], rank: int, processes: int) -> list[Any]:
    return experts[rank::processes]


def _check(config: FlexOlmoConfig, distributed: Any) -> None:
    others = {name: getattr(distributed, name) for name in ("fsdp_size", "dp_replicate_size", "pp_size")}
    if distributed.ep_size != distributed.tp_size or set(others.values()) != {1}:
        raise ConfigurationError(
            f"ep_size is {distributed.ep_size} with tp_size={distributed.tp_size} and {others}, but processes that "
            "share experts work on one batch together.",
            "Set ep_size and tp_size to the number of processes, and none of the others.",
        )
    if distributed.ep_plan is not None or distributed.ep_implementation not in ("auto", "all_reduce"):
        raise ConfigurationError(
            f"ep_plan={distributed.ep_plan} and ep_implementation={distributed.ep_implementation!r} ask for another "
            "way than whole experts and a sum of their outputs.",
            "Leave both out.",
        )
    names = [config.expert_names[index] for index in config.loaded_indices]
    if relative := [name for name in names if "rank" in config.expert_forms.get(name, {})]:
        raise ConfigurationError(
            f"The low-rank experts {relative} are differences to the public one, and need it in their process.",
            "Leave ep_size out: tp_size alone shares the public expert among the processes.",
        )
