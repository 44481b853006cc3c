"""Which experts a live model uses: names in, positions out.

The set in force is held by the layers (as positions) and shown by the configuration (as names). It changes here and
nowhere else, so what is checked here can be trusted in `forward`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from flexolmo_hf.errors import ExpertNotLoadedError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.names import parse_expert_set


class ExpertSets:
    """Expert names and the set in force, for a model made of `FlexOlmoMixture` layers."""

    config: FlexOlmoConfig

    @property
    def expert_names(self) -> list[str]:
        """Names of the experts in memory, in checkpoint order."""
        return [self.config.expert_names[index] for index in self.expert_indices]

    @property
    def expert_indices(self) -> list[int]:
        """Checkpoint indices of the experts in memory, ascending."""
        return [int(index) for index in self.mixtures[0].experts]

    @property
    def active_experts(self) -> list[str]:
        """Names of the experts in force, in checkpoint order."""
        # Read from the layers, not from the configuration: two models may share one configuration object.
        names, active = self.expert_names, self.mixtures[0].active
        return names if active is None else [names[position] for position in active]

    @property
    def mixtures(self) -> list[FlexOlmoMixture]:
        """The mixture of each layer, first layer first."""
        return [layer.mlp for layer in self.base_model.layers]  # type: ignore[attr-defined]

    def expert_position(self, name: str) -> int:
        """Return where an expert stands among those in memory.

        Raises:
            UnknownExpertError: If the checkpoint has no such expert.
            ExpertNotLoadedError: If it was left out at load time.
        """
        (name,) = parse_expert_set([name], self.config.expert_names)
        if name not in self.expert_names:
            raise ExpertNotLoadedError(name, self.expert_names)
        return self.expert_names.index(name)

    def expert_modules(self, name: str) -> list[nn.Module]:
        """Return the feed-forward network of one expert in each layer, first layer first."""
        index = str(self.expert_indices[self.expert_position(name)])
        return [mixture.experts[index] for mixture in self.mixtures]

    def set_active_experts(self, names: str | Iterable[str] | None) -> None:
        """Choose the experts that take part from now on; the others are neither computed nor routed to.

        Args:
            names: Any of `expert_names`; None for all that are in memory. ``"public+math"`` is read as two names.

        Raises:
            UnknownExpertError: If the checkpoint has no such expert.
            ExpertNotLoadedError: If it was left out at load time.
            DuplicateExpertError: If a name is repeated.
            EmptyExpertSetError: If there is no name.
            ExpertTypeError: If something else than names is given.
        """
        loaded = self.expert_names
        chosen = loaded if names is None else parse_expert_set(names, self.config.expert_names)
        positions = tuple(self.expert_position(name) for name in chosen)
        self.config.active_experts = chosen
        for mixture in self.mixtures:
            mixture.active = None if len(positions) == len(loaded) else positions
        self._active_experts_changed()

    @contextmanager
    def use_experts(self, *names: str) -> Iterator[Any]:
        """Use these experts inside a ``with`` block and return to the former set after it, whatever happens.

        The set belongs to the model: threads that share one model share it too.
        """
        before = self.active_experts
        self.set_active_experts(names)
        try:
            yield self
        finally:
            self.set_active_experts(before)

    def _active_experts_changed(self) -> None:
        """Let a head follow the number of active experts."""
