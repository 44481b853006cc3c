"""Which parameters move: one expert, its router row and its bias, and nothing else."""

from torch import nn

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import PUBLIC


def freeze_except(model: ExpertSets, expert: str, *, train_router: bool = True) -> list[str]:
    """Freeze a model but for one expert's feed-forward networks, its router row and its bias.

    Frozen means: not handed to the optimizer. While it is trained the row is a parameter of its own, since weight decay
    and noise act on whole parameters and would move the other rows of a shared matrix; every state dict shows it in its
    place. Works with any trainer that optimizes the parameters that require a gradient. `unfreeze` undoes it.

    Args:
        model: A FlexOlmo model that holds the expert, with the expert in force.
        expert: Which expert to train.
        train_router: Whether its router row and bias are trained too.

    Returns:
        The names of the parameters that are trained.

    Raises:
        UnknownExpertError: If the checkpoint has no such expert.
        ExpertNotLoadedError: If it was left out at load time.
        ConfigurationError: If it is the public expert, is not in force and would never be trained, or is offloaded.
    """
    position = model.expert_position(expert)
    if expert == PUBLIC:
        raise ConfigurationError(
            f"Expert {PUBLIC!r} is the anchor that all owners share, so it is never trained.",
            "Choose the new expert; FlexOlmoForCausalLM.from_dense(..., expert=NAME) makes one.",
        )
    if expert not in model.active_experts:
        raise ConfigurationError(
            f"Expert {expert!r} is not in force ({model.active_experts}), so it would receive no gradient.",
            "Switch it on with set_active_experts first.",
        )
    if any(mixture.gate.weight.is_meta and hasattr(mixture.gate, "_hf_hook") for mixture in model.mixtures):
        raise ConfigurationError(
            "Weights that are offloaded cannot be trained: they are in memory only while their layer runs.",
            "Load the model without a device_map that offloads; leave out experts it does not need.",
        )
    unfreeze(model)
    model.requires_grad_(False)  # type: ignore[attr-defined]
    for module in model.expert_modules(expert):
        module.requires_grad_(True)
    if train_router:
        for mixture in model.mixtures:
            mixture.gate.split_row(position)
    return [name for name, p in model.named_parameters() if p.requires_grad]  # type: ignore[attr-defined]


def unfreeze(model: ExpertSets) -> None:
    """Write trained router rows back into their matrices and let every parameter require a gradient again."""
    for mixture in model.mixtures:
        mixture.gate.join_row()
    model.requires_grad_(True)  # type: ignore[attr-defined]


def project_biases(model: nn.Module) -> None:
    """Bring trained biases back to at most 0 after an optimizer step.

    The router uses ``min(b, 0)``, which has no gradient above 0: a bias that crossed it would stay there for good. Held
    at 0 it still has one (projected gradient descent).
    """
    for name, parameter in model.named_parameters():
        if name.endswith(".gate.trained_bias"):
            parameter.data.clamp_(max=0)
