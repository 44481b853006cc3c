"""The router's own learning rate: its rows are few numbers, and need not move at the pace of an expert's matrices."""

import torch
from torch import nn


def scale_router_rate(optimizer: torch.optim.Optimizer, model: nn.Module, scale: float) -> None:
    """Give trained router rows and biases a learning rate of their own, in parameter groups of their own.

    To be called before a schedule is made, which takes each group's rate as its start.

    Args:
        optimizer: Over parameters of the model.
        model: The model.
        scale: The router's rate over the others'.
    """
    router = {
        id(parameter) for name, parameter in model.named_parameters() if ".gate." in name and parameter.requires_grad
    }
    if scale == 1:
        return
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in router]
        if not own:
            continue
        group["params"] = [parameter for parameter in group["params"] if id(parameter) not in router]
        options = {key: value for key, value in group.items() if key != "params"}
        optimizer.add_param_group({**options, "params": own, "lr": group["lr"] * scale})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
