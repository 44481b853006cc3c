"""Which parameters move while the router is tuned: the rows and biases of all experts, and nothing else."""

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.trainers.freezing import project_biases, refuse_offloaded, unfreeze


def freeze_all_but_routers(model: ExpertSets, *, train_public_row: bool = True) -> list[str]:
    """Freeze a model but for the router rows and biases of all its experts; `unfreeze` undoes it.

    The public bias stays 0, and the public row what it is if it is not trained, whatever the optimizer does: what is
    held is a parameter of its own that requires no gradient, put into its place in the matrix during `forward`.

    Args:
        model: A FlexOlmo model with the public expert, all its experts in force.
        train_public_row: Whether the public row moves too. Without, packages trained beside the same anchor still fit.

    Returns:
        The names of the parameters that are trained, all of them ``...mlp.gate...``.

    Raises:
        ExpertNotLoadedError, UnknownExpertError: If the public expert is not in memory.
        ConfigurationError: If some experts are not in force, there is one alone, or the weights are offloaded.
    """
    public = model.expert_position(PUBLIC)
    if model.active_experts != model.expert_names:
        raise ConfigurationError(
            f"Only {model.active_experts} of {model.expert_names} are in force, so the others' rows would not learn.",
            "Switch all on with set_active_experts(None), or load the model without those that are not wanted.",
        )
    if len(model.expert_names) == 1:
        raise ConfigurationError(
            f"{PUBLIC!r} is the only expert, so there is nothing to weigh.", "Merge experts first, then tune."
        )
    refuse_offloaded(model)
    unfreeze(model)
    model.requires_grad_(False)  # type: ignore[attr-defined]
    for mixture in model.mixtures:
        gate = mixture.gate
        gate.requires_grad_(True)
        if gate.bias is not None or not train_public_row:
            gate.split_row(public)
            gate.trained_row.requires_grad_(train_public_row)
        if gate.trained_bias is not None:
            gate.trained_bias.requires_grad_(False)
    # Above 0 a bias has no gradient, and is worth what 0 is.
    project_biases(model)  # type: ignore[arg-type]
    return [name for name, p in model.named_parameters() if p.requires_grad]  # type: ignore[attr-defined]
