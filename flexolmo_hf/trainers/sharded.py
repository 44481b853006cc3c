"""One expert out of a model that is sharded over several processes, without gathering the rest.

Shape letters: H hidden, E experts in memory.
"""

from collections.abc import Mapping

import torch
from torch.distributed.tensor import DTensor

from flexolmo_hf.composition.shared_weights import SHARED, is_shared
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.router import FlexOlmoRouter


@torch.no_grad()
def expert_state(model: ExpertSets, expert: str) -> dict[str, torch.Tensor]:
    """Gather one expert's tensors on the CPU, one after the other.

    Nothing else is gathered, so no process needs room for the model. Every process has to call it, and each gets all of
    the expert. A model that is not sharded is read as it is.

    Args:
        model: A FlexOlmo model, sharded by `torch.distributed.fsdp.fully_shard`, or not.
        expert: Which expert.

    Returns:
        The tensors by the names they have in a package: ``layers.N.gate_proj.weight`` and its like,
        ``layers.N.router.row`` ``(H,)`` and, with biases, ``layers.N.router.bias`` ``(1,)``.

    Raises:
        UnknownExpertError: If the checkpoint has no such expert.
        ExpertNotLoadedError: If it was left out at load time.
        ConfigurationError: If shared weights are trained as well, which these tensors leave out.
    """
    position = model.expert_position(expert)
    _refuse_shared(model)
    found: dict[str, torch.Tensor] = {}
    for layer, (mixture, module) in enumerate(zip(model.mixtures, model.expert_modules(expert), strict=True)):
        for name, parameter in module.named_parameters():
            found[f"layers.{layer}.{name}"] = whole(parameter)
        found[f"layers.{layer}.router.row"] = _row(mixture.gate, position)
        if mixture.gate.bias is not None:
            found[f"layers.{layer}.router.bias"] = _bias(mixture.gate, position)
    return found


@torch.no_grad()
def load_expert_state(model: ExpertSets, expert: str, state: Mapping[str, torch.Tensor]) -> None:
    """Put what `expert_state` gathered into a model that is not sharded, such as the one training started from.

    Args:
        model: A FlexOlmo model that holds the expert, in the same form.
        expert: Which expert.
        state: From `expert_state`.

    Raises:
        UnknownExpertError: If the checkpoint has no such expert.
        ExpertNotLoadedError: If it was left out at load time.
        ConfigurationError: If the tensors are not those of this expert.
    """
    position = model.expert_position(expert)
    targets: dict[str, torch.Tensor] = {}
    for layer, (mixture, module) in enumerate(zip(model.mixtures, model.expert_modules(expert), strict=True)):
        mixture.gate.join_row()
        targets |= {f"layers.{layer}.{name}": parameter for name, parameter in module.named_parameters()}
        targets[f"layers.{layer}.router.row"] = mixture.gate.weight[position]
        if mixture.gate.bias is not None:
            targets[f"layers.{layer}.router.bias"] = mixture.gate.bias[position : position + 1]
    shapes = {name: tuple(tensor.shape) for name, tensor in targets.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in state.items()}:
        raise ConfigurationError(
            f"The tensors are not those of expert {expert!r} in this model.",
            "Load the model that training started from, with the expert in the form in which it was trained.",
        )
    for name, target in targets.items():
        target.copy_(state[name])


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of all of a tensor on the CPU; of a sharded one, every process has to ask."""
    gathered = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()
    return gathered.detach().cpu()


def _refuse_shared(model: ExpertSets) -> None:
    parameters = dict(model.named_parameters())  # type: ignore[attr-defined]
    if all(parameter.requires_grad for parameter in parameters.values()):
        # Nothing was frozen: the model as it is loaded, not one in which some weights were chosen.
        return
    if moving := [
        group for group in SHARED if any(p.requires_grad and is_shared(n, [group]) for n, p in parameters.items())
    ]:
        raise ConfigurationError(
            f"The shared weights {moving} are trained as well, and an expert's own tensors leave them out: the package "
            "would not say that they moved.",
            "Save the whole model with the trainer, and make the package from its folder with `flexolmo pack`.",
        )


def _row(router: FlexOlmoRouter, position: int) -> torch.Tensor:
    if router.trained_position == position:
        return whole(router.trained_row)
    return whole(router.weight)[position].clone()


def _bias(router: FlexOlmoRouter, position: int) -> torch.Tensor:
    if router.trained_position == position:
        return whole(router.trained_bias)
    return whole(router.bias)[position : position + 1].clone()
