"""Which parameters move: one expert, its router row and its bias, and nothing else."""

from collections.abc import Sequence

from torch import nn

from flexolmo_hf.composition.shared_weights import SHARED, is_shared
from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import PUBLIC


def freeze_except(
    model: ExpertSets,
    expert: str,
    *,
    train_router: bool = True,
    unfreeze_shared: Sequence[str] = (),
    allow_training_anchor: bool = False,
) -> list[str]:
    """Freeze a model but for one expert's feed-forward networks, its router row and its bias.

    Frozen means: not handed to the optimizer. While it is trained the row is a parameter of its own, since weight decay
    and noise act on whole parameters and would move the other rows of a shared matrix; every state dict shows it in its
    place. Works with any trainer that optimizes the parameters that require a gradient. `unfreeze` undoes it.

    Args:
        model: A FlexOlmo model that holds the expert, with the expert in force.
        expert: Which expert to train.
        train_router: Whether its router row and bias are trained too.
        unfreeze_shared: Shared weights that move too, of `SHARED`, as in post-training (BAR, arXiv 2604.18473). Other
            experts then no longer fit to the bit, and leaving this one out is no longer exact.
        allow_training_anchor: Whether the expert may be the public one, from which all owners start.

    Returns:
        The names of the parameters that are trained.

    Raises:
        UnknownExpertError: If the checkpoint has no such expert.
        ExpertNotLoadedError: If it was left out at load time.
        ConfigurationError: If it is the public expert, is not in force and would never be trained, is offloaded or
            quantised, nothing would be trained, or `unfreeze_shared` names something else than shared weights.
    """
    position = model.expert_position(expert)
    if expert == PUBLIC and not allow_training_anchor:
        raise ConfigurationError(
            f"Expert {PUBLIC!r} is the anchor that all owners share, so it is never trained.",
            "Choose the new expert (FlexOlmoForCausalLM.from_dense(..., expert=NAME) makes one), or say "
            "allow_training_anchor=True if you are the one who makes the anchor.",
        )
    if expert not in model.active_experts:
        raise ConfigurationError(
            f"Expert {expert!r} is not in force ({model.active_experts}), so it would receive no gradient.",
            "Switch it on with set_active_experts first.",
        )
    refuse_offloaded(model)
    _refuse_unlearnable(model, expert, alone=not (train_router or unfreeze_shared))
    if unknown := [name for name in unfreeze_shared if name not in SHARED]:
        raise ConfigurationError(f"There are no shared weights called {unknown}.", f"Choose of {list(SHARED)}.")
    unfreeze(model)
    model.requires_grad_(False)  # type: ignore[attr-defined]
    for module in model.expert_modules(expert):
        module.requires_grad_(True)
    if train_router:
        for mixture in model.mixtures:
            mixture.gate.split_row(position)
            if expert == PUBLIC and mixture.gate.trained_bias is not None:
                # The public expert's bias is 0, whoever trains it.
                mixture.gate.trained_bias.requires_grad_(False)
    for name, parameter in model.named_parameters():  # type: ignore[attr-defined]
        if is_shared(name, unfreeze_shared):
            parameter.requires_grad_(True)
    return [name for name, p in model.named_parameters() if p.requires_grad]  # type: ignore[attr-defined]


def _refuse_unlearnable(model: ExpertSets, expert: str, *, alone: bool) -> None:
    weights = [parameter for module in model.expert_modules(expert) for parameter in module.parameters()]
    if not all(weight.is_floating_point() for weight in weights):
        raise ConfigurationError(
            f"Expert {expert!r} is quantised, and quantised weights do not learn.",
            "Load the model without a quantization_config to train it, and quantise what comes of it.",
        )
    if alone and not weights:
        raise ConfigurationError(
            f"Expert {expert!r} has no weight that learns and its router row is left out, so nothing would be trained.",
            "Leave train_router at True, or load the expert in a form that can be trained.",
        )


def refuse_offloaded(model: ExpertSets) -> None:
    """Refuse to train weights that are in memory only while their layer runs.

    Raises:
        ConfigurationError: If there are such.
    """
    if any(mixture.gate.weight.is_meta and hasattr(mixture.gate, "_hf_hook") for mixture in model.mixtures):
        raise ConfigurationError(
            "Weights that are offloaded cannot be trained: they are in memory only while their layer runs.",
            "Load the model without a device_map that offloads; leave out experts it does not need.",
        )


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
        if name.endswith((".gate.trained_bias", ".gate.bias")) and parameter.requires_grad:
            parameter.data.clamp_(max=0)
