"""The experts of a layer as two 3-D tensors, for kernels that want them so; the linear weights are views of them.

Shape letters: E experts in memory, F feed-forward width, H hidden, N tokens, K experts per token.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate

from flexolmo_hf.modeling.few_rows import FewRowsLinear

_LINEAR = ("gate_proj", "up_proj", "down_proj")
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class PackedExperts:
    """What upstream's experts interface expects of a module of fused experts, without owning any parameter.

    Attributes:
        gate_up_proj: ``(E, 2F, H)``; of each expert, the first F rows are ``gate_proj.weight``, the rest ``up_proj``'s.
        down_proj: ``(E, H, F)``.
    """

    has_gate = True
    has_bias = False
    has_post_expert_norm = False
    is_transposed = False
    is_concatenated = True
    training = False
    _apply_gate = _default_apply_gate

    def __init__(self, experts: Sequence[Any], config: Any):
        """Copy the experts' weights into two tensors and make the linear weights views of them, one by one."""
        with torch.inference_mode(False), torch.no_grad():
            # Whoever packs first may be in inference mode; the weights are to remain trainable.
            self._move(experts, config)

    def _move(self, experts: Sequence[Any], config: Any) -> None:
        first = experts[0]
        inner, hidden = first.gate_proj.weight.shape
        self.num_experts = len(experts)
        self.hidden_dim, self.intermediate_dim = hidden, inner
        self.act_fn = first.act_fn
        self.config = config
        self.gate_up_proj = first.gate_proj.weight.new_empty((len(experts), 2 * inner, hidden)).detach()
        self.down_proj = first.down_proj.weight.new_empty((len(experts), hidden, inner)).detach()
        for expert, views in zip(experts, self._views(), strict=True):
            # It would keep the memory that the weights leave.
            expert.joined = None
            for weight, view in zip(_weights(expert), views, strict=True):
                view.copy_(weight.detach())
                # The parameter stays the same object, so optimizers and tied references keep holding it; its former
                # memory is free as soon as its place in the 3-D tensor is filled.
                weight.data = view

    def holds(self, experts: Sequence[Any]) -> bool:
        """Tell whether the linear weights still are this memory: whoever sets ``.data`` moves them away."""
        if len(experts) != self.num_experts or not can_pack(experts):
            return False
        return all(
            _place(weight) == _place(view)
            for expert, views in zip(experts, self._views(), strict=True)
            for weight, view in zip(_weights(expert), views, strict=True)
        )

    def __call__(
        self,
        implementation: str,
        tokens_NH: torch.Tensor,
        chosen_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        *,
        has_empty_slots: bool,
    ) -> torch.Tensor:
        """Run one of upstream's kernels.

        Args:
            implementation: Its name in transformers' experts interface.
            tokens_NH: The tokens.
            chosen_NK: Each token's experts; E for a slot that stays empty.
            weights_NK: Their weights.
            has_empty_slots: Whether there may be empty slots.

        Returns:
            The mixture's output, ``(N, H)``.
        """
        # Upstream's kernels skip such slots where experts live on several devices; here some rows use fewer experts.
        self._is_expert_parallel = has_empty_slots
        output: torch.Tensor = ALL_EXPERTS_FUNCTIONS[implementation](self, tokens_NH, chosen_NK, weights_NK)
        return output

    def _views(self) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        inner = self.intermediate_dim
        return [
            (gate_up[:inner], gate_up[inner:], down)
            for gate_up, down in zip(self.gate_up_proj, self.down_proj, strict=True)
        ]


def can_pack(experts: Sequence[Any]) -> bool:
    """Tell whether the experts are plain weights of one kind and shape, not quantised, adapted or offloaded ones."""
    if any(type(getattr(expert, name, None)) is not FewRowsLinear for expert in experts for name in _LINEAR):
        return False
    # An offloaded weight is a shape; its values come when its own module runs.
    if any(hasattr(getattr(expert, name), "_hf_hook") for expert in experts for name in _LINEAR):
        return False
    weights = [weight for expert in experts for weight in _weights(expert)]
    if len({expert.gate_proj.weight.shape for expert in experts}) > 1:
        return False
    return len({(weight.dtype, weight.device) for weight in weights}) == 1 and all(
        weight.dtype in _KERNEL_DTYPES and not is_traceable_wrapper_subclass(weight) for weight in weights
    )


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    # Of the storage, not of the data: tensors without data have one too.
    return int(tensor.untyped_storage()._cdata), int(tensor.storage_offset())


def _weights(expert: Any) -> list[nn.Parameter]:
    return [expert.get_submodule(name).weight for name in _LINEAR]
