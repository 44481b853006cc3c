"""The mixture that stands where a dense decoder has its feed-forward network.

Shape letters: B batch, T tokens, H hidden, E experts in memory, A experts that may be used, K experts per token,
N = B*T. Where the rows of a batch use different sets, A is E.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling import on_cpu
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.low_rank import build_expert
from flexolmo_hf.modeling.packing import PackedExperts, can_pack
from flexolmo_hf.modeling.router import FlexOlmoRouter
from flexolmo_hf.modeling.selection import Selection
from flexolmo_hf.modeling.untouched import is_untouched

#: Ways to run the experts that this module knows; all others are kernels of transformers' experts interface.
AUTO, DENSE, EAGER, GROUPED = "auto", "dense", "eager", "grouped_mm"


class FlexOlmoMixture(nn.Module):
    """Differs from upstream's sparse block in that every expert is an ordinary module under its checkpoint index.

    FlexOlmo's experts are few and huge, so one 3-D tensor for all of them buys little; separate `nn.Linear` weights
    are loaded without a copy, frozen and trained one by one, and left out without being read.

    Attributes:
        gate: The router over all experts in memory.
        experts: The experts in memory, keyed by checkpoint index ("0", "3").
        in_force: Who uses which experts when a call does not say; None for all in memory.
        packed: The experts as 3-D tensors that share the linear weights' memory, or None.
        recompute_frozen: Whether experts that do not learn are computed again in the backward pass, instead of keeping
            their activations.
    """

    def __init__(self, config: FlexOlmoConfig, layer_idx: int = 0):
        super().__init__()
        self.gate = FlexOlmoRouter(config)
        self.experts = nn.ModuleDict()
        for index in config.loaded_indices:
            form = config.expert_forms.get(config.expert_names[index])
            self.experts[str(index)] = build_expert(config, form, self.public)
        self.config = config
        self.layer_idx = layer_idx
        self.in_force: Selection | None = None
        self.packed: PackedExperts | None = None
        self.recompute_frozen = False

    @property
    def public(self) -> nn.Module | None:
        """Expert 0, which low-rank experts are relative to; None if it is not in memory."""
        return self.experts["0"] if "0" in self.experts else None  # noqa: SIM401 (not a mapping)

    def forward(self, hidden_BTH: torch.Tensor, selection: Selection | None = None) -> torch.Tensor:
        """Mix the outputs of each token's experts.

        Args:
            hidden_BTH: The residual stream, ``(B, T, H)``.
            selection: Who uses which experts; None for the set in force.

        Returns:
            The mixture's output, ``(B, T, H)``.
        """
        selection = self.in_force if selection is None else selection
        selection = None if selection is None else selection.to(hidden_BTH.device)
        experts = list(self.experts.values())
        if selection is not None and selection.positions is not None:
            experts = selection.experts[self.layer_idx]
        _, probs_BTA = self.gate(hidden_BTH, selection)
        widest = len(experts) if selection is None else selection.widest
        per_token = min(self.config.num_experts_per_tok, widest)
        per_row = selection is not None and selection.per_row
        method = self._method(per_token == widest, experts, per_row=per_row)
        if per_token == widest and method == DENSE:
            # Every token uses all its experts: no choice, hence no sort, no gather and no wait for the device.
            return self._dense(hidden_BTH, probs_BTA.to(hidden_BTH.dtype), experts, selection)
        probs_NA = probs_BTA.reshape(-1, len(experts))
        weights_NK, chosen_NK = choose(probs_NA, per_token=per_token, normed=self.config.norm_topk_prob)
        weights_NK = weights_NK.to(hidden_BTH.dtype)
        if method == DENSE:
            weights_BTA = spread(weights_NK, chosen_NK, experts=len(experts)).view_as(probs_BTA)
            return self._dense(hidden_BTH, weights_BTA, experts, selection)
        tokens_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
        if selection is not None and selection.allowed is not None:
            # A row with fewer experts than slots leaves slots empty; an empty slot is marked A and never computed.
            allowed_NA = selection.allowed.repeat_interleave(hidden_BTH.shape[1], dim=0)
            chosen_NK = torch.where(allowed_NA.gather(1, chosen_NK), chosen_NK, len(experts))
        if method == EAGER:
            return _one_by_one(tokens_NH, chosen_NK, weights_NK, experts, self._run).view_as(hidden_BTH)
        return self._packed_kernel(method, tokens_NH, chosen_NK, weights_NK, selection).view_as(hidden_BTH)

    def of_one_token(self, token_H: torch.Tensor, selection: Selection | None) -> torch.Tensor | None:
        """Mix for one token on a CPU, as `forward` does with experts that need not be called themselves.

        Args:
            token_H: The residual stream.
            selection: As in `forward`.

        Returns:
            The mixture's output, ``(H,)``; None where a module has to be called.
        """
        selection = self.in_force if selection is None else selection
        wanted = self.config._experts_implementation or AUTO
        if not is_untouched(self.__dict__) or FlexOlmoMixture.forward is not _FORWARD:
            return None
        if wanted not in (AUTO, DENSE, EAGER):
            return None
        if type(self.gate) is not FlexOlmoRouter or (selection is not None and selection.per_row):
            return None
        selection = None if selection is None else selection.to(token_H.device)
        probs_A = self.gate.of_one_token(token_H, selection)
        if probs_A is None:
            return None
        experts: Sequence[Any] = list(self.experts.values())
        if selection is not None and selection.positions is not None:
            experts = selection.experts[self.layer_idx]
        per_token, shares_K = self.config.num_experts_per_tok, probs_A
        if per_token < len(experts):
            if wanted == DENSE:
                return None
            shares_K, chosen_K = choose(probs_A, per_token=per_token, normed=self.config.norm_topk_prob)
            experts = [experts[expert] for expert in chosen_K.tolist()]
        weights = on_cpu.plain_weights(experts, token_H)
        return None if weights is None else on_cpu.mix_for_one(token_H, weights, experts[0].act_fn, shares_K)

    def _method(self, all_used: bool, experts: Sequence[nn.Module], *, per_row: bool) -> str:
        """Choose how to run the experts: see docs/modeling/running_experts.md."""
        wanted = self.config._experts_implementation or AUTO
        compiling = torch.compiler.is_compiling()
        if wanted in (DENSE, EAGER):
            return wanted
        if wanted == AUTO and all_used:
            return DENSE
        # A 3-D tensor is no parameter: where the experts learn, they run one by one.
        learning = torch.is_grad_enabled() and any(p.requires_grad for e in experts for p in e.parameters())
        if wanted == AUTO:
            on_accelerator = self.gate.weight.device.type not in ("cpu", "meta")
            if learning or not (on_accelerator or (compiling and self.packed is not None)):
                return DENSE if compiling else EAGER
        if learning:
            return EAGER
        kernel = GROUPED if wanted == AUTO else wanted
        if per_row and kernel != GROUPED:
            # Only this kernel skips empty slots. Others compute some expert there and multiply by zero.
            return DENSE if compiling else EAGER
        if compiling:
            # Packing moves memory, which a compiled forward cannot; without it, all experts run on all tokens.
            fits = self.packed is not None and can_pack(list(self.experts.values()))
            return kernel if fits else DENSE
        if self.packed is None or not self.packed.holds(list(self.experts.values())):
            if not can_pack(list(self.experts.values())):
                return EAGER
            self.pack()
        return kernel

    def _run(self, expert: Any, tokens: torch.Tensor) -> torch.Tensor:
        if (
            self.recompute_frozen
            and torch.is_grad_enabled()
            and not any(parameter.requires_grad for parameter in expert.parameters())
        ):
            again: torch.Tensor = checkpoint(expert, tokens, use_reentrant=False)
            return again
        output: torch.Tensor = expert(tokens)
        return output

    def _dense(
        self, hidden_BTH: torch.Tensor, weights_BTA: torch.Tensor, experts: Sequence[Any], selection: Selection | None
    ) -> torch.Tensor:
        weights = on_cpu.plain_weights(experts, hidden_BTH)
        if weights is not None:
            return _dense_on_cpu(hidden_BTH, weights_BTA, experts[0].act_fn, weights, selection)
        # The input keeps its batch dimension, which per-sample gradients need. Where rows differ, an expert sees only
        # the rows that may use it: a weight of 0 would not keep a NaN out, forward or backward.
        mixed: Any = None
        for column, expert in enumerate(experts):
            weight = weights_BTA[..., column : column + 1]
            rows = None
            if selection is not None and selection.per_row:
                if not selection.counts[column]:
                    continue
                rows = selection.rows[column]
            if rows is None:
                output = self._run(expert, hidden_BTH) * weight
                mixed = output if mixed is None else mixed + output
            else:
                output = self._run(expert, hidden_BTH.index_select(0, rows)) * weight.index_select(0, rows)
                mixed = torch.zeros_like(hidden_BTH, dtype=output.dtype) if mixed is None else mixed
                mixed = mixed.index_add(0, rows, output.to(mixed.dtype))
        result: torch.Tensor = mixed
        return result

    def _packed_kernel(
        self,
        method: str,
        tokens_NH: torch.Tensor,
        chosen_NK: torch.Tensor,
        weights_NK: torch.Tensor,
        selection: Selection | None,
    ) -> torch.Tensor:
        if selection is not None and selection.positions is not None:
            # The 3-D tensors hold all experts in memory; the choice was among those of the set.
            chosen_NK = selection.positions[chosen_NK]
        per_row = selection is not None and selection.per_row
        return self.packed(method, tokens_NH, chosen_NK, weights_NK, has_empty_slots=per_row)  # type: ignore[misc]

    def pack(self) -> None:
        """Hold the experts in memory as 3-D tensors, of which the linear weights become views: no second copy.

        Raises:
            ConfigurationError: If the experts are quantised, adapted, offloaded, low-rank or of several widths.
        """
        experts = list(self.experts.values())
        if not can_pack(experts):
            raise ConfigurationError(
                "These experts cannot be packed: their weights are not plain ones of one kind on one device.",
                "Pack before adding adapters; quantised, offloaded, low-rank and narrow experts run unpacked.",
            )
        self.packed = PackedExperts(experts, self.config)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # `assign=True` gives the parameters other memory, and comes to the experts after this: pack when next run.
        self.packed = None
        super()._load_from_state_dict(*args, **kwargs)

    def repack(self) -> None:
        """Follow experts that have come or gone, if they are packed; those of several forms run unpacked."""
        if self.packed is not None:
            self.packed = None
            if can_pack(list(self.experts.values())):
                self.pack()

    def _apply(self, fn: Any, recurse: bool = True) -> "FlexOlmoMixture":
        # `.to`, `.half` and their kin give each parameter memory of its own; those of packed experts share it again.
        super()._apply(fn, recurse)
        self.repack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave the 3-D tensors out of copies and pickles: a copy would not share memory with its parameters."""
        return {**self.__dict__, "packed": None}


# Some libraries replace what a whole class does.
_FORWARD = FlexOlmoMixture.forward


def choose(probs_NA: torch.Tensor, *, per_token: int, normed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose the experts of each token, and weigh them.

    Args:
        probs_NA: Router probabilities over the experts that may be used, ``(N, A)``; of one token ``(A,)``.
        per_token: Experts per token, 1 to A.
        normed: Whether the weights of a token are made to sum to 1 (``norm_topk_prob``).

    Returns:
        Weights ``(N, K)``, or ``(K,)``, in the dtype of `probs_NA`, largest first, and the experts' columns, int64.
    """
    weights_NK, chosen_NK = probs_NA.topk(per_token, dim=-1)
    if normed:
        weights_NK = weights_NK / weights_NK.sum(dim=-1, keepdim=True)
    return weights_NK, chosen_NK


def spread(weights_NK: torch.Tensor, chosen_NK: torch.Tensor, *, experts: int) -> torch.Tensor:
    """Return the weights by expert, ``(N, A)``, with 0 for each expert that a token did not choose."""
    return weights_NK.new_zeros((len(weights_NK), experts)).scatter(-1, chosen_NK, weights_NK)


def _dense_on_cpu(
    hidden_BTH: torch.Tensor,
    weights_BTA: torch.Tensor,
    activation: Any,
    weights: Sequence[on_cpu.Weights],
    selection: Selection | None,
) -> torch.Tensor:
    """Run each expert on all tokens of the rows that may use it."""
    tokens_NH = hidden_BTH.reshape(-1, hidden_BTH.shape[-1])
    if selection is None or not selection.per_row:
        counts, positions_S = [len(tokens_NH)] * len(weights), None
        shares_S1 = weights_BTA.reshape(len(tokens_NH), -1).T.reshape(-1, 1)
    else:
        length = hidden_BTH.shape[1]
        counts = [rows * length for rows in selection.counts]
        steps_T = torch.arange(length)
        positions_S = (selection.pair_rows.unsqueeze(1) * length + steps_T).flatten()  # type: ignore[union-attr]
        shares_S1 = weights_BTA[selection.pair_rows, :, selection.pair_columns].reshape(-1, 1)
    return on_cpu.mix(tokens_NH, weights, activation, counts, positions_S, shares_S1).view_as(hidden_BTH)


def _one_by_one(
    tokens_NH: torch.Tensor,
    chosen_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    experts: Sequence[Any],
    run: Callable[[Any, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Give each expert its tokens in one piece; A marks an empty slot. Reads the counts on the host, once."""
    per_token = chosen_NK.shape[1]
    if len(tokens_NH) == 1 and tokens_NH.device.type == "cpu":
        # One token, as in decoding: nothing to sort or gather.
        chosen = [(slot, expert) for slot, expert in enumerate(chosen_NK[0].tolist()) if expert < len(experts)]
        used = [experts[expert] for _, expert in chosen]
        weights_K1 = weights_NK[0] if len(chosen) == per_token else weights_NK[0, [slot for slot, _ in chosen]]
        weights_K1 = weights_K1.unsqueeze(-1)
        plain = on_cpu.plain_weights(used, tokens_NH)
        if plain is not None:
            return on_cpu.mix(tokens_NH, plain, used[0].act_fn, [1] * len(used), None, weights_K1)
        outputs_KH = torch.cat([run(expert, tokens_NH) for expert in used])
        return (outputs_KH * weights_K1).sum(0, keepdim=True).to(tokens_NH.dtype)
    order = chosen_NK.reshape(-1).argsort(stable=True)
    counts = torch.bincount(chosen_NK.reshape(-1), minlength=len(experts) + 1).tolist()
    plain = on_cpu.plain_weights(experts, tokens_NH)
    if plain is not None:
        filled_S = order[: len(order) - counts.pop()]
        shares_S1 = weights_NK.reshape(-1, 1)[filled_S]
        return on_cpu.mix(tokens_NH, plain, experts[0].act_fn, counts, filled_S // per_token, shares_S1)
    pieces = tokens_NH[order // per_token].split(counts)
    outputs = [run(expert, piece) for expert, piece in zip(experts, pieces, strict=False) if len(piece)]
    if counts[len(experts)]:
        outputs.append(tokens_NH.new_zeros((counts[len(experts)], tokens_NH.shape[1]), dtype=outputs[0].dtype))
    weighted = torch.cat(outputs) * weights_NK.reshape(-1)[order].unsqueeze(-1)
    # Back in the order of the slots, each token's outputs are summed in the order of its choices: the same every time.
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return weighted[back].view(*chosen_NK.shape, -1).sum(dim=1).to(tokens_NH.dtype)
