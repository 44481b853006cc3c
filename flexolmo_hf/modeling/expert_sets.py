"""Which experts a live model uses: names in, selections out.

The set in force is held by the layers (as a `Selection`) and shown by the configuration (as names). It changes here
and nowhere else, so what is checked here can be trusted in `forward`. A call may bring sets of its own, which leave no
trace in the model: threads that share one can serve people with different rights.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flexolmo_hf.errors import ConfigurationError, ExpertNotLoadedError, ExpertRowsError, ExpertsChangedError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert_parallel import refuse_spread
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.names import parse_expert_set
from flexolmo_hf.modeling.selection import RowNames, Selection, read_rows, select
from flexolmo_hf.modeling.stamp import Stamp

# While experts come or go: no call may begin, and none that is running may end well.
_CHANGING = Stamp()


class ExpertSets:
    """Expert names and the set in force, for a model made of `FlexOlmoMixture` layers."""

    config: FlexOlmoConfig
    #: The router as it was before it was tuned (`files.router_base.RouterBase`), which goes where the model goes; None
    #: for one that never was.
    router_base: Any = None

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
        selection = self.mixtures[0].in_force
        return self.expert_names if selection is None else list(selection.names[0])

    @property
    def mixtures(self) -> list[FlexOlmoMixture]:
        """The mixture of each layer, first layer first."""
        return [layer.mlp for layer in self.base_model.layers]  # type: ignore[attr-defined]

    @property
    def _in_force(self) -> Selection:
        selection = self.mixtures[0].in_force
        if selection is None:
            return self._selection_of((tuple(self.expert_names),))
        if not torch.compiler.is_compiling() and not self._is_current(selection):
            return self._selection_of((selection.names[0],))
        return selection

    def refuse_set_by_hand(self) -> None:
        """Refuse a configuration whose set is not the one in force: whoever wrote it there meant it.

        Raises:
            ConfigurationError: If `config.active_experts` was changed by hand, to other experts.
        """
        shown = self.config.active_experts
        if self.config.shows_what_a_model_wrote():
            return
        in_force = self.mixtures[0].in_force
        # Without names: another thread may be saving, with a configuration of its own.
        everyone = in_force is None or len(in_force.names[0]) == len(self.mixtures[0].experts)
        if everyone if shown is None else set(shown) == set(self.active_experts):
            return
        raise ConfigurationError(
            f"config.active_experts was set to {shown} by hand, which no model follows: {self.active_experts} is in "
            "force.",
            f"Choose with model.set_active_experts({'[...]' if shown == [] else shown}).",
        )

    def expert_position(self, name: str) -> int:
        """Return where an expert stands among those in memory.

        Raises:
            UnknownExpertError: If the checkpoint has no such expert.
            ExpertNotLoadedError: If it is in the checkpoint but not in memory.
        """
        (name,) = parse_expert_set([name], self.config.expert_names)
        if name not in self.expert_names:
            raise ExpertNotLoadedError(name, self.expert_names)
        return self.expert_names.index(name)

    def expert_modules(self, name: str) -> list[nn.Module]:
        """Return the feed-forward network of one expert in each layer, first layer first.

        Raises:
            UnknownExpertError, ExpertNotLoadedError: As `expert_position`.
            ConfigurationError: If the experts are spread over processes.
        """
        refuse_spread(self.mixtures, "give out the weights of an expert")
        index = str(self.expert_indices[self.expert_position(name)])
        return [mixture.experts[index] for mixture in self.mixtures]

    def set_active_experts(self, names: str | Iterable[str] | None) -> None:
        """Choose the experts that take part from now on; the others are neither computed nor routed to.

        Args:
            names: Any of `expert_names`; None for all that are in memory. ``"public+math"`` is read as two names.

        Raises:
            UnknownExpertError: If the checkpoint has no such expert.
            ExpertNotLoadedError: If it is in the checkpoint but not in memory.
            DuplicateExpertError: If a name is repeated.
            EmptyExpertSetError: If there is no name.
            ExpertTypeError: If something else than names is given.
        """
        chosen = self._loaded_set(names) if names is not None else tuple(self.expert_names)
        selection = self._selection_of((chosen,))
        self.config.show(chosen)
        for mixture in self.mixtures:
            mixture.in_force = selection
        self._active_experts_changed()

    @contextmanager
    def use_experts(self, *names: str) -> Iterator[Any]:
        """Use these experts inside a ``with`` block and return to the former set after it, whatever happens.

        The set belongs to the model: threads that share one model share it too. A set for one call alone is given to
        the call: ``model(..., active_experts=...)``.
        """
        self.refuse_set_by_hand()
        before = self.active_experts
        self.set_active_experts(names)
        try:
            yield self
        finally:
            # Some may have been removed inside the block. If all were, the block's set stays: never all experts.
            self.set_active_experts([name for name in before if name in self.expert_names] or self.active_experts)

    def select_experts(self, active_experts: Any, batch: int | None = None) -> Selection:
        """Resolve what a call gives as ``active_experts``.

        Args:
            active_experts: Names for the whole batch; a list with names, or None, for each row; a bool mask ``(E,)`` or
                ``(B, E)`` over the experts in memory; a `Selection`; or None for the set in force.
            batch: The number of rows, for the check; None if not known.

        Returns:
            What the layers need.

        Raises:
            ExpertRowsError: If there are more or fewer sets than rows, or a mask does not fit.
            UnknownExpertError, ExpertNotLoadedError, DuplicateExpertError, EmptyExpertSetError, ExpertTypeError: If a
                set is none of this model's. ConfigurationError: As `refuse_set_by_hand`, for the set in force.
        """
        if active_experts is None:
            if not torch.compiler.is_compiling():
                self.refuse_set_by_hand()
            return self._in_force
        if isinstance(active_experts, Selection):
            if batch is not None and active_experts.per_row and batch != active_experts.rows_given:
                _refuse_row_count(active_experts.rows_given, batch)
            return active_experts
        loaded = self.expert_names
        rows = read_rows(active_experts, loaded)
        if rows is None:
            return self._selection_of((self._loaded_set(active_experts),))
        if getattr(active_experts, "ndim", 2) == 1:
            return self._selection_of((self._loaded_set(rows[0]),))
        if batch is not None and len(rows) != batch:
            _refuse_row_count(len(rows), batch)
        if any(row is None for row in rows):
            self.refuse_set_by_hand()
        in_force = tuple(self.active_experts)
        return self._selection_of(tuple(in_force if row is None else self._loaded_set(row) for row in rows))

    def _loaded_set(self, names: Any) -> tuple[str, ...]:
        chosen = tuple(parse_expert_set(names, self.config.expert_names))
        loaded = self.expert_names
        for name in chosen:
            if name not in loaded:
                raise ExpertNotLoadedError(name, loaded)
        return chosen

    def _selection_of(self, names: RowNames) -> Selection:
        backbone = self.base_model  # type: ignore[attr-defined]
        if len(names) > 1:
            return self._resolve(names)
        # One set is used over and over, by many calls: a live switch then is a look-up.
        known = backbone._selections
        if names[0] not in known or not self._is_current(known[names[0]]):
            known[names[0]] = self._resolve(names)
        selection: Selection = known[names[0]]
        return selection

    def _is_current(self, selection: Selection) -> bool:
        # A library may have put a module of its own in the place of an expert since, or a copy in that of a layer.
        return selection.version.id == self.experts_version and all(
            set(map(id, chosen)) <= set(map(id, mixture.experts.values()))
            for chosen, mixture in zip(selection.experts, self.mixtures, strict=False)
        )

    def _resolve(self, names: RowNames) -> Selection:
        # The version first: if an expert comes or goes from here on, the selection is of the former state.
        backbone = self.base_model  # type: ignore[attr-defined]
        version, device = backbone._experts_stamp, backbone.device
        experts = [mixture.experts for mixture in self.mixtures]
        try:
            # It may be resolved in inference mode and kept for a training step.
            with torch.inference_mode(False):
                return select(experts, self.expert_names, names, device, version)
        except ValueError as error:
            raise ExpertsChangedError(["+".join(row) for row in names]) from error

    @property
    def experts_version(self) -> str:
        """Changes whenever an expert comes or goes, or weights move to another device; no two models share one."""
        return str(self.base_model._experts_stamp.id)  # type: ignore[attr-defined]

    def refuse_stale(self, selection: Selection) -> None:
        """Refuse a selection that was resolved against other experts: its positions mean others now.

        Raises:
            ExpertsChangedError: If an expert has come or gone since, or the selection is another model's.
        """
        if selection.version.id != self.experts_version or self.experts_version == _CHANGING.id:
            raise ExpertsChangedError(["+".join(row) for row in selection.names])

    def _experts_in_memory_changed(self, active: Iterable[str]) -> None:
        """Forget what was resolved and hashed of other experts, and put a set in force."""
        backbone = self.base_model  # type: ignore[attr-defined]
        backbone._experts_stamp = Stamp()
        backbone._selections, backbone._hashes = {}, {}
        self.set_active_experts(list(active))

    @contextmanager
    def _changing_experts(self) -> Iterator[None]:
        """Refuse every call while layers are changed one after the other."""
        self.refuse_set_by_hand()
        backbone, before = self.base_model, self.active_experts  # type: ignore[attr-defined]
        backbone._experts_stamp = _CHANGING
        try:
            yield
        finally:
            self._experts_in_memory_changed([name for name in before if name in self.expert_names])

    def pack_experts(self) -> None:
        """Hold the experts of each layer as 3-D tensors whose slices are the linear weights, for grouped kernels.

        The memory is the same, but one layer's experts exist twice while they move. Saving, `.to()`, training, and
        adding or removing experts work as before.

        Raises:
            ConfigurationError: If the experts are quantised, adapted, offloaded or spread over processes.
        """
        refuse_spread(self.mixtures, "be packed")
        for mixture in self.mixtures:
            mixture.pack()

    def _active_experts_changed(self) -> None:
        """Let a head follow the number of active experts."""


def _refuse_row_count(given: int, batch: int) -> None:
    raise ExpertRowsError(f"{given} sets of experts for {batch} rows", "give one set per row, or one for all")
