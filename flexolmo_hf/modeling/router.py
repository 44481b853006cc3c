"""The router: one row, and optionally one bias, per expert; the set in force is a choice of rows.

Shape letters: B batch, T tokens, H hidden, E experts in memory, A experts that are active.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoTopKRouter

from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.selection import Selection
from flexolmo_hf.modeling.untouched import is_untouched


class FlexOlmoRouter(FlexOlmoTopKRouter):
    """Differs from upstream's router in three ways: active rows, an optional negative bias, and one row trained alone.

    Inactive experts are left out of the matrix instead of being masked: a row that is not there cannot leak into the
    softmax, and the result is bit for bit that of a checkpoint merged without the expert.

    Attributes:
        weight: All rows in memory, ``(E, H)``: the checkpoint's matrix.
        bias: All biases in memory, ``(E,)``, or None. The public expert's entry is 0.
        trained_row: While one expert is trained, its row ``(H,)`` as a parameter of its own; else None.
        trained_bias: Its bias ``(1,)``, or None.
    """

    weight: nn.Parameter
    bias: Any

    def __init__(self, config: FlexOlmoConfig):
        super().__init__(config)
        loaded = len(config.loaded_indices)
        self.weight = nn.Parameter(torch.zeros(loaded, config.hidden_size))
        self.register_parameter("bias", nn.Parameter(torch.zeros(loaded)) if config.router_bias else None)
        self.register_parameter("trained_row", None)
        self.register_parameter("trained_bias", None)
        self.trained_position: int | None = None

    def forward(
        self, hidden_BTH: torch.Tensor, selection: Selection | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the experts that may be used, for each token (arXiv 2507.07024).

        Args:
            hidden_BTH: The residual stream, any leading dimensions; ``(B, T, H)`` where rows differ.
            selection: Who uses which experts; None for all in memory.

        Returns:
            Logits ``(B*T, A)`` in the dtype of the input, flattened as upstream records them, and probabilities
            ``(..., A)`` with the input's leading dimensions, float32. Where rows differ, A is all in memory, and what a
            row may not use has the logit -inf and the probability 0.
        """
        if selection is not None and selection.per_row:
            return self._row_by_row(hidden_BTH, selection)
        weight, bias = self.rows(None if selection is None else selection.positions)
        logits = F.linear(hidden_BTH, weight, bias)
        return logits.reshape(-1, logits.shape[-1]), logits.softmax(dim=-1, dtype=torch.float32)

    def of_one_token(self, token_H: torch.Tensor, selection: Selection | None) -> torch.Tensor | None:
        """Return one token's probabilities ``(A,)`` as `forward` does, or None if that has to be called.

        Args:
            token_H: The residual stream, on a CPU.
            selection: One set for the whole batch, or None for all in memory.
        """
        if FlexOlmoRouter.forward is not _FORWARD or not is_untouched(self.__dict__):
            return None
        weight, bias = self.rows(None if selection is None else selection.positions)
        logits = torch.mv(weight, token_H)
        return (logits if bias is None else logits.add_(bias)).softmax(-1, dtype=torch.float32)

    def _row_by_row(self, hidden_BTH: torch.Tensor, selection: Selection) -> tuple[torch.Tensor, torch.Tensor]:
        # Each set scores its own rows of the batch with its own rows of the matrix: what is not in the set takes no
        # part, neither forward nor backward, where a mask of -inf would still multiply its weights by zero.
        batch, tokens, _ = hidden_BTH.shape
        everyone = len(self.weight)
        all_logits = hidden_BTH.new_full((batch, tokens, everyone), float("-inf"))
        all_probs = hidden_BTH.new_zeros((batch, tokens, everyone), dtype=torch.float32)
        for group in selection.groups:
            logits = F.linear(hidden_BTH.index_select(0, group.rows), *self.rows(group.positions))
            probs = logits.softmax(dim=-1, dtype=torch.float32)
            shape = (*logits.shape[:2], everyone)
            spread = logits.new_full(shape, float("-inf")).index_copy(2, group.positions, logits)
            all_logits = all_logits.index_copy(0, group.rows, spread.to(all_logits.dtype))
            all_probs = all_probs.index_copy(
                0, group.rows, probs.new_zeros(shape).index_copy(2, group.positions, probs)
            )
        return all_logits.reshape(-1, everyone), all_probs

    def rows(self, positions: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the matrix ``(A, H)`` and the clamped biases ``(A,)`` or None of some experts in memory.

        Args:
            positions: Which, ``(A,)`` int64; None for all.
        """
        weight, bias = self._with_trained_row()
        if bias is not None:
            bias = bias.clamp(max=0)
        if positions is not None:
            weight = weight.index_select(0, positions)
            bias = None if bias is None else bias.index_select(0, positions)
        return weight, bias

    def _with_trained_row(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        at = self.trained_position
        if at is None:
            return self.weight, self.bias
        weight = torch.cat([self.weight[:at], self.trained_row.unsqueeze(0), self.weight[at + 1 :]])
        bias = self.bias
        if bias is not None:
            bias = torch.cat([bias[:at], self.trained_bias, bias[at + 1 :]])
        return weight, bias

    def split_row(self, position: int) -> None:
        """Give one row (and bias) a parameter of its own, so that an optimizer cannot touch the others.

        Weight decay, clipping and noise act on whole parameters; a mask on a shared matrix would not hold them back.

        Args:
            position: Which of the experts in memory.
        """
        self.join_row()
        with torch.inference_mode(False):
            # What is made in inference mode could not be trained.
            self.trained_row = nn.Parameter(self.weight.detach()[position].clone())
            if self.bias is not None:
                self.trained_bias = nn.Parameter(self.bias.detach()[position : position + 1].clone())
        self.trained_position = position

    def join_row(self) -> None:
        """Write a row that was trained alone back into the matrix; without one, do nothing."""
        if self.trained_position is None:
            return
        with torch.no_grad():
            weight, bias = self._with_trained_row()
            self.weight.copy_(weight)
            if bias is not None:
                self.bias.copy_(bias)
        self.register_parameter("trained_row", None)
        self.register_parameter("trained_bias", None)
        self.trained_position = None

    def insert_row(self, position: int, row: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Insert the row ``(H,)`` of one more expert, and its bias ``(1,)``; without one it is 0."""
        row = row.to(self.weight).unsqueeze(0)
        self._replace(lambda old, new: torch.cat([old[:position], new, old[position:]]), row, bias)

    def remove_row(self, position: int) -> None:
        """Remove the row of one expert, and its bias."""
        self._replace(lambda old, _: torch.cat([old[:position], old[position + 1 :]]), self.weight[:0], None)

    def _replace(
        self, change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], row: torch.Tensor, bias: torch.Tensor | None
    ) -> None:
        with torch.inference_mode(False), torch.no_grad():
            # Whoever lets an expert come or go may be in inference mode; the matrix is to remain trainable.
            self.weight = nn.Parameter(change(self.weight, row), requires_grad=self.weight.requires_grad)
            if self.bias is not None:
                new = self.bias.new_zeros(len(row)) if bias is None else bias.to(self.bias)
                self.bias = nn.Parameter(change(self.bias, new), requires_grad=self.bias.requires_grad)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        # A checkpoint knows no row of its own: whoever asks for the state sees the joined matrix.
        if self.trained_position is None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            return
        weight, bias = self._with_trained_row()
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        if bias is not None:
            destination[prefix + "bias"] = bias if keep_vars else bias.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        at, expected_missing = self.trained_position, []
        if at is not None:
            # Hand the split parameters their part of the joined matrix, without adding keys to the caller's dictionary.
            state_dict = dict(state_dict)
            if prefix + "weight" in state_dict:
                state_dict[prefix + "trained_row"] = _placed_like(self.trained_row, state_dict[prefix + "weight"][at])
            if prefix + "bias" in state_dict:
                state_dict[prefix + "trained_bias"] = _placed_like(
                    self.trained_bias, state_dict[prefix + "bias"][at : at + 1]
                )
            expected_missing = [prefix + "trained_row", prefix + "trained_bias"]
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key not in expected_missing)

    def extra_repr(self) -> str:
        """Say how many rows there are and whether they carry a bias."""
        rows, width = self.weight.shape
        return f"experts={rows}, hidden_size={width}, bias={self.bias is not None}"


# Some libraries replace what a whole class does.
_FORWARD = FlexOlmoRouter.forward


def _placed_like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Return a part of a matrix, sharded over processes as the parameter is that it is meant for."""
    if type(part) is torch.Tensor:
        return part
    from torch.distributed.tensor import DTensor

    both = isinstance(part, DTensor) and isinstance(parameter, DTensor)
    return part.redistribute(placements=parameter.placements) if both else part  # type: ignore[attr-defined]
