"""The models that are trained, and one step of each as a bare loop: stock with masked gradients, and ours frozen.

All start from one checkpoint, take the same batch and end each step with the same optimizer, so that what differs is
what has to be computed and kept.

Shape letters: B batch, T tokens, E experts.
"""

from typing import Any

import torch
import transformers
from torch import nn

#: Of the two experts, the one that is trained, by name and by index.
EXPERT, INDEX = "expert_1", 1
RATE = 1e-4


def tokens(batch: int, length: int, vocabulary: int) -> torch.Tensor:
    """Return the batch that everyone trains on, ``(B, T)``."""
    return torch.randint(2, vocabulary, (batch, length), generator=torch.Generator().manual_seed(0))


def adamw(parameters: Any) -> torch.optim.AdamW:
    """Return the optimizer of every contestant: the trainer's default kind, without weight decay."""
    return torch.optim.AdamW(parameters, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def stock(folder: str, implementation: str, *, freeze: bool) -> tuple[nn.Module, torch.optim.AdamW]:
    """Load the stock model and let only the expert's slices receive a gradient.

    Args:
        folder: The checkpoint.
        implementation: How stock runs its experts.
        freeze: Whether parameters of which no part is trained are frozen, instead of masked like the others.
    """
    model = transformers.FlexOlmoForCausalLM.from_pretrained(
        folder, num_experts_per_tok=2, experts_implementation=implementation
    )
    for name, parameter in model.named_parameters():
        mask = _mask(name, parameter)
        if mask is None and freeze:
            parameter.requires_grad_(False)
        else:
            # In place and after the gradient is complete: a hook that returned a product would need as much again.
            parameter.register_post_accumulate_grad_hook(_masking(mask))
    model.train()
    return model, adamw([parameter for parameter in model.parameters() if parameter.requires_grad])


def _mask(name: str, parameter: torch.Tensor) -> int | None:
    # Experts are fused along the first dimension, and the router has a row for each.
    return INDEX if ".mlp.experts." in name or name.endswith(".mlp.gate.weight") else None


def _masking(kept: int | None) -> Any:
    def mask(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        if kept is None:
            parameter.grad.zero_()
        else:
            parameter.grad[:kept].zero_()
            parameter.grad[kept + 1 :].zero_()

    return mask


def ours(folder: str) -> tuple[nn.Module, torch.optim.AdamW]:
    """Load this package's model and freeze all but the expert."""
    import flexolmo_hf

    model = flexolmo_hf.FlexOlmoForCausalLM.from_pretrained(folder, num_experts_per_tok=2)
    flexolmo_hf.freeze_except(model, EXPERT)
    model.train()
    return model, adamw([parameter for parameter in model.parameters() if parameter.requires_grad])


def bare_step(model: Any, optimizer: torch.optim.AdamW, ids_BT: torch.Tensor) -> float:
    """Take one step with the model's own loss, and return it."""
    loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def moment_bytes(optimizer: Any) -> int:
    """Return the bytes of AdamW's two moments; its step counters, four bytes a tensor, are left out."""
    return sum(
        value.nbytes for state in optimizer.state.values() for key, value in state.items() if key.startswith("exp_avg")
    )
