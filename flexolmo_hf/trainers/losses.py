"""The paper's two z-losses, computed from what a training forward pass already produces (arXiv 2507.07024).

Shape letters: B batch, T tokens, H hidden, A active experts, V vocabulary, L layers.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flexolmo_hf.modeling.router import FlexOlmoRouter


def router_z_loss(logits: Sequence[torch.Tensor], attention_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Penalise large router logits: the squared log-normaliser, averaged over tokens and layers.

    Args:
        logits: Per layer ``(B*T, A)``.
        attention_mask: ``(B, T)``, 0 where tokens are padding; None if there is none.

    Returns:
        A scalar, float32.
    """
    squares_LN = torch.stack([layer.float().logsumexp(dim=-1).square() for layer in logits])
    if attention_mask is None:
        return squares_LN.mean()
    kept_N = attention_mask.reshape(-1).to(squares_LN.dtype)
    return (squares_LN * kept_N).sum() / (kept_N.sum().clamp(min=1) * len(logits))


def lm_z_squares(
    hidden_BTH: torch.Tensor, head: nn.Linear, labels_BT: torch.Tensor, log_probs_BT: torch.Tensor
) -> torch.Tensor:
    """Return the squared log-normaliser of each next-token distribution without building its logits.

    A label's log-probability is its logit less the log-normaliser, so one dot product per token gives the latter.

    Args:
        hidden_BTH: Last hidden states of the predicting positions.
        head: The output projection ``(V, H)``.
        labels_BT: The label each position predicts; -100 is ignored.
        log_probs_BT: The label's log-probability; 0 where the label is ignored.

    Returns:
        ``(B, T)``, float32, 0 where the label is ignored.
    """
    counted = labels_BT != -100
    rows_BTH = head.weight[labels_BT.clamp(min=0)]
    logit_BT = (hidden_BTH.float() * rows_BTH.float()).sum(dim=-1)
    return (logit_BT - log_probs_BT.float()).square() * counted


class TrainingTap:
    """Listens to a model during one forward pass: router logits, last hidden states and log-probabilities.

    TRL's trainer runs the backbone and a fused head instead of the model's own `forward`, and returns neither router
    logits nor hidden states. Hooks are installed once, so that a compiled model is not traced anew at every step.
    """

    def __init__(self, model: nn.Module):
        self.router_logits: list[torch.Tensor] = []
        self.hidden_BTH = torch.empty(0)
        self.log_probs_BT: torch.Tensor | None = None
        self._listening = False
        for module in model.modules():
            if isinstance(module, FlexOlmoRouter):
                module.register_forward_hook(self._hear_router)
        model.base_model.register_forward_hook(self._hear_backbone)  # type: ignore[union-attr]
        model.register_forward_hook(self._hear_model)

    @contextmanager
    def listening(self) -> Iterator["TrainingTap"]:
        """Record inside the block; what was recorded is dropped with the next block."""
        self.release()
        self._listening = True
        try:
            yield self
        finally:
            # Gradient checkpointing runs layers again in the backward pass: those calls are not heard.
            self._listening = False

    def release(self) -> None:
        """Forget what was recorded, so that no activation outlives its step."""
        self.router_logits, self.hidden_BTH, self.log_probs_BT = [], torch.empty(0), None

    def _hears(self) -> bool:
        # A pass without gradient is a reference's, not the policy's.
        return self._listening and torch.is_grad_enabled()

    def _hear_router(self, module: nn.Module, args: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        if self._hears():
            self.router_logits.append(output[0])

    def _hear_backbone(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._hears():
            self.hidden_BTH = output.last_hidden_state

    def _hear_model(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._hears():
            # Absent where the loss is made of whole logits: with smoothed labels, or by the caller's own function.
            self.log_probs_BT = output.get("log_probs")
