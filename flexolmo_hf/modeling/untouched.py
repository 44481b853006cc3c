"""Whether modules are only what they were made as, so that what they compute may be computed without calling them.

Libraries put hooks around modules, functions of their own in the place of `forward`, and adapters in the place of
modules. All of them must be called. This runs for every module for every token: `nn.Module`'s own attribute look-up
would take longer than a small model's products.
"""

from typing import Any

import torch
from torch.nn.modules import module as modules


def nothing_watches(tokens: torch.Tensor) -> bool:
    """Tell whether plain modules on a CPU would do no more than compute their outputs.

    Args:
        tokens: What they are to work on.

    Returns:
        False where there is no CPU, or gradient, autocast or a compiler, where a library looks at every module there
        is, and where the tokens have no values or several.
    """
    if tokens.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return False
    # What stands for a tensor without values, or for several, must not come into memory that outlives the call.
    return type(tokens) is torch.Tensor and not torch._C._are_functorch_transforms_active()


def is_untouched(state: dict[str, Any]) -> bool:
    """Tell whether nothing was put around a module or in the place of its ``forward``.

    Args:
        state: The module's ``__dict__``.
    """
    return not (state["_forward_hooks"] or state["_forward_pre_hooks"] or "forward" in state)
