"""Whether modules are only what they were made as, so that what they compute may be computed without calling them.

Libraries put hooks around modules, functions of their own in the place of `forward`, and adapters in the place of
modules. All of them must be called. This runs for every module for every token: `nn.Module`'s own attribute look-up
would take longer than a small model's products.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules
from transformers.utils import output_capturing


def nothing_watches(tokens: torch.Tensor) -> bool:
    """Tell whether plain modules on a CPU would do no more than compute their outputs.

    Args:
        tokens: What they are to work on.

    Returns:
        False where there is no CPU, or gradient, autocast, a compiler or a trace, where a library looks at every module
        or function there is, and where the tokens have no values or several.
    """
    if tokens.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if torch.is_autocast_enabled("cpu") or modules._global_forward_hooks or modules._global_forward_pre_hooks:
        return False
    # A mode may put something else in the place of a function, and a trace would keep this token's numbers.
    if torch._C._len_torch_function_stack() or torch._C._get_tracing_state() is not None:
        return False
    # What stands for a tensor without values, or for several, must not come into memory that outlives the call.
    return type(tokens) is torch.Tensor and not torch._C._are_functorch_transforms_active()


def is_recording() -> bool:
    """Tell whether this call is to return router logits, hidden states or attentions."""
    return bool(output_capturing._active_collector.get())


def is_untouched(state: dict[str, Any]) -> bool:
    """Tell whether nothing was put around a module or in the place of its ``forward``.

    Args:
        state: The module's ``__dict__``.
    """
    if state["_forward_pre_hooks"] or "forward" in state or state.get("_compiled_call_impl") is not None:
        return False
    return not state["_forward_hooks"] or _only_records_nothing(state["_forward_hooks"].values())


def _only_records_nothing(hooks: Iterable[Any]) -> bool:
    # Once asked for router logits, hidden states or attentions, transformers leaves its hooks on the modules for good;
    # in a call that asks for none of them they do nothing.
    if is_recording():
        return False
    return all(getattr(hook, "__module__", None) == output_capturing.__name__ for hook in hooks)


def plain_weight(linear_or_norm: nn.Module) -> torch.Tensor | None:
    """Return the weight of a module, or None if it is no plain parameter, or is not all there is.

    Args:
        linear_or_norm: One that nothing else may be known of than its type.
    """
    state = linear_or_norm.__dict__
    parameters = state["_parameters"]
    # A linear layer without a bias says so; where it says nothing, somebody has put another thing there.
    if isinstance(linear_or_norm, nn.Linear) and parameters.get("bias", state) is not None:
        return None
    if not is_untouched(state):
        return None
    weight = parameters.get("weight")
    return weight if type(weight) is nn.Parameter else None
