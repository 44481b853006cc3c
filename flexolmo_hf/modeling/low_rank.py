"""Experts of other forms than the dense network's: low-rank differences to the public expert, and narrower networks.

A low-rank expert is ``W = W_public + B A`` for each of its three matrices (FlexMoRE, arXiv 2602.08818). It is run as
it is stored: the public matrix is the public expert's own, and the product ``B A`` is never formed.

Shape letters: I input width of a matrix, O its output width, r rank, ... any leading dimensions.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert import MATRICES, FlexOlmoExpert
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.gated import gated


class LowRankDifference(nn.Module):
    """What one matrix adds to the public expert's: two factors, ``A`` ``(r, I)`` and ``B`` ``(O, r)``."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        # Linear layers, so that what knows those (per-sample gradients, quantisers) knows the factors.
        self.A = FewRowsLinear(inputs, rank, bias=False)
        self.B = FewRowsLinear(rank, outputs, bias=False)

    def forward(self, input: torch.Tensor, public: nn.Module) -> torch.Tensor:
        """Multiply ``(..., I)`` by the public matrix and by the difference, ``(..., O)``."""
        output: torch.Tensor = public(input) + self.B(self.A(input))
        return output


class LowRankExpert(nn.Module):
    """An expert that holds nothing but its difference to the public one, whose module it uses.

    It is defined relative to the public weights. Where the public expert is not in force it takes no part by itself:
    no token is routed to it.

    Args:
        config: The model's configuration.
        rank: Rank of each difference.
        public: The public expert of the same layer.
    """

    def __init__(self, config: FlexOlmoConfig, rank: int, public: nn.Module):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.config = config
        self.hidden_size, self.intermediate_size, self.rank = hidden, inner, rank
        self.gate_proj = LowRankDifference(hidden, inner, rank)
        self.up_proj = LowRankDifference(hidden, inner, rank)
        self.down_proj = LowRankDifference(inner, hidden, rank)
        self.act_fn = ACT2FN[config.hidden_act]
        # In a tuple it is no submodule: its parameters appear once, under its own name, and are not trained from here.
        self._relative_to = (public,)

    @property
    def public(self) -> Any:
        """The public expert of the same layer."""
        return self._relative_to[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the network, ``(..., H)`` to ``(..., H)``."""
        public = self.public
        inner = gated(self.act_fn, self.gate_proj(x, public.gate_proj), self.up_proj(x, public.up_proj))
        output: torch.Tensor = self.down_proj(inner, public.down_proj)
        return output

    def extra_repr(self) -> str:
        """Say what the differences are relative to."""
        return f"rank={self.rank}, relative to the public expert"


class NarrowExpert(FlexOlmoExpert):
    """Differs from `FlexOlmoExpert` in that it has fewer neurons than the others; kernels for equal ones pass it by."""


def build_expert(config: FlexOlmoConfig, form: Mapping[str, int] | None, public: nn.Module | None) -> nn.Module:
    """Make an expert of some form, its weights not yet filled in.

    Args:
        config: The model's configuration.
        form: As in `FlexOlmoConfig.expert_forms`; nothing for a full one.
        public: The public expert of the same layer, if it is in memory.

    Raises:
        ConfigurationError: If a low-rank expert has no public one to be relative to.
    """
    if not form:
        return FlexOlmoExpert(config)
    if "width" in form:
        return NarrowExpert(config, form["width"])
    if public is None:
        first = config.expert_names[0]
        raise ConfigurationError(
            f"A low-rank expert is a difference to {first!r}, which is not in memory.",
            f"Load it first: model.load_expert({first!r}).",
        )
    return LowRankExpert(config, form["rank"], public)


def tensor_shapes(hidden: int, inner: int, form: Mapping[str, int] | None = None) -> dict[str, tuple[int, int]]:
    """Return the names and shapes of one expert's tensors in one layer, as in the model and in files.

    Args:
        hidden: The hidden size.
        inner: The width of a full expert.
        form: As in `FlexOlmoConfig.expert_forms`; nothing for a full one.
    """
    form = form or {}
    inner = form.get("width", inner)
    full = dict(zip(MATRICES, [(inner, hidden), (inner, hidden), (hidden, inner)], strict=True))
    if "rank" not in form:
        return full
    factors: dict[str, tuple[int, int]] = {}
    for matrix, (outputs, inputs) in full.items():
        first, second = factor_names(matrix)
        factors |= {first: (form["rank"], inputs), second: (outputs, form["rank"])}
    return factors


def factor_names(matrix: str) -> tuple[str, str]:
    """Return the names of the factors A and B of a matrix: ``up_proj.A.weight`` for ``up_proj.weight``."""
    name = matrix.removesuffix(".weight")
    return f"{name}.A.weight", f"{name}.B.weight"


def describe_form(form: Mapping[str, int] | None) -> str:
    """Say in words what form an expert has: ``full``, ``rank 16`` or ``width 512``."""
    return ", ".join(f"{kind} {size}" for kind, size in form.items()) if form else "full"
