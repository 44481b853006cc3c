"""The reference of preference learning: the policy itself as it was, and no second model in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.low_rank import LowRankExpert
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.trainers.proof import fingerprint, hash_tensors


class Reference(nn.Module):
    """Stands where TRL wants a reference model; runs the policy as it was at the start.

    It has no parameters of its own: nothing is moved, sharded or saved twice.

    Args:
        policy: The model that is trained.
        expert: Which of its experts is.
        kind: ``"anchor"``, ``"start"`` or ``"auto"``; see `flexolmo_hf.trainers.config.WithReference`.
    """

    policy: Any
    trained: list[nn.Parameter]
    start: list[torch.Tensor]

    def __init__(self, policy: FlexOlmoForCausalLM, expert: str, kind: str = "auto"):
        super().__init__()
        # Past nn.Module's own registration: the policy must not become a part of its reference.
        object.__setattr__(self, "policy", policy)
        self.others = tuple(name for name in policy.active_experts if name != expert)
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        if kind == "anchor" and _moves_shared(policy):
            raise ConfigurationError(
                "The anchor cannot be the reference of a run that moves shared weights: it moves with them.",
                'Choose reference="start".',
            )
        if kind == "auto":
            anchor = starts_as_the_anchor(policy, expert) and not _moves_shared(policy)
            kind = "anchor" if anchor else "start"
        self.kind = kind
        object.__setattr__(self, "trained", trained)
        object.__setattr__(self, "start", [p.detach().clone() for p in trained] if self.kind == "start" else [])

    def record(self) -> dict[str, Any]:
        """Return what a resumed run must be held against as well: the kind, and a fingerprint of the start."""
        weights = fingerprint(hash_tensors({str(index): tensor for index, tensor in enumerate(self.start)}))
        return {"reference": self.kind, "reference weights": weights}

    @property
    def config(self) -> Any:
        """The policy's configuration."""
        return self.policy.config

    def get_output_embeddings(self) -> Any:
        """Return the policy's head, which is frozen."""
        return self.policy.get_output_embeddings()

    def base_model(self, *args: Any, **kwargs: Any) -> Any:
        """Run the policy's backbone as it was."""
        with self.in_force():
            return self.policy.base_model(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the policy as it was."""
        with self.in_force():
            return self.policy(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the policy's state as it was: TRL tells references apart by it."""
        with self.in_force():
            return {name: tensor.clone() for name, tensor in self.policy.state_dict(*args, **kwargs).items()}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the policy be its own reference inside the block."""
        if self.kind == "anchor":
            with self.policy.use_experts(*self.others):
                yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        for index, parameter in enumerate(self.trained):
            self.start[index], parameter.data = parameter.data, self.start[index]


def _moves_shared(policy: FlexOlmoForCausalLM) -> bool:
    return any(parameter.requires_grad for name, parameter in policy.named_parameters() if ".mlp." not in name)


def starts_as_the_anchor(policy: FlexOlmoForCausalLM, expert: str) -> bool:
    """Tell whether a model with the expert is, now, the same function as without it.

    Two equal experts whose weights sum to 1 are one expert, whatever the router says.
    """
    if policy.active_experts != [PUBLIC, expert] or policy.config.num_experts_per_tok < 2:
        return False
    modules: list[Any] = list(policy.expert_modules(expert))
    if all(isinstance(module, LowRankExpert) for module in modules):
        # A difference of zero to the public expert.
        return all(not part.B.weight.any() for own in modules for part in (own.gate_proj, own.up_proj, own.down_proj))
    pairs = zip(policy.expert_modules(PUBLIC), modules, strict=True)
    return all(
        torch.equal(mine, theirs)
        for public, own in pairs
        for mine, theirs in zip(public.parameters(), own.parameters(), strict=True)
    )
