"""Experts that come and go while a model runs, each at the cost of one expert: nothing else is built or read again."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from flexolmo_hf.errors import (
    ConfigurationError,
    EmptyExpertSetError,
    IncompleteCheckpointError,
)
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert import FlexOlmoExpert
from flexolmo_hf.modeling.expert_parallel import refuse_spread
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.download import fetch_part
from flexolmo_hf.modeling.files.locate import looks_like_a_repository, named_errors
from flexolmo_hf.modeling.files.needed_files import read_weight_map, weight_files
from flexolmo_hf.modeling.files.router_base import read_router_base
from flexolmo_hf.modeling.low_rank import LowRankExpert, build_expert, tensor_shapes
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.names import PUBLIC, parse_expert_set
from flexolmo_hf.modeling.stamp import Stamp


@dataclass(frozen=True)
class CheckpointSource:
    """Where a model came from: what `load_expert` reads.

    Attributes:
        path: A folder, or a repository on the Hub.
        revision: The commit, for a repository.
        subfolder: Where in it.
        variant: As upstream.
        cache_dir: As upstream.
        local_files_only: As upstream; what was loaded without the network is added to without it.
    """

    path: str
    revision: str | None = None
    subfolder: str = ""
    variant: str | None = None
    cache_dir: str | None = None
    local_files_only: bool = False

    def fetch(self, expert: str, token: str | None = None) -> Path:
        """Return the folder with the settings and one expert's files; of a repository, they are downloaded."""
        if not looks_like_a_repository(self.path):
            return Path(self.path) / self.subfolder
        options: dict[str, Any] = {
            "active_experts": [expert],
            "revision": self.revision,
            "subfolder": self.subfolder,
            "token": token,
        }
        options |= {"cache_dir": self.cache_dir, "local_files_only": self.local_files_only}
        return fetch_part(self.path, variant=self.variant, **options) / self.subfolder


@dataclass(frozen=True)
class LayerParts:
    """One expert in one layer: matrices or their factors by name, router row ``(H,)``, bias ``(1,)`` or None."""

    matrices: dict[str, torch.Tensor]
    row: torch.Tensor
    bias: torch.Tensor | None


class LiveExperts(ExpertSets):
    """`add_expert`, `new_expert`, `remove_expert` and `load_expert`.

    An optimizer made before one of them does not know the new parameters (the router's matrix is one of them): make it
    anew. A call that runs meanwhile, in another thread, ends with `ExpertsChangedError`.
    """

    #: Where the model came from; None for one that was not loaded.
    source: CheckpointSource | None = None
    #: Where experts that were added lie, by name, and the names that were removed. Replaced, never changed in place.
    _homes: Mapping[str, str] = MappingProxyType({})
    _forgotten: frozenset[str] = frozenset()
    #: Checks a package and inserts its expert. Packages are the business of another room, which knows this one and not
    #: the other way round: registration brings the two together.
    package_adder: Callable[["LiveExperts", Any, str | None], None]

    def add_expert(self, package: Any, name: str | None = None) -> None:
        """Put an expert package beside the experts in memory, as merging would have.

        It takes part at once where all experts do; where a set is in force, that set stays in force.

        Args:
            package: An `ExpertPackage`, the folder of one, or a repository on the Hub.
            name: What to call it; default the package's name.

        Raises:
            AnchorMismatchError: If it was trained beside another public model. The shared weights are hashed for it.
            DuplicateExpertError, InvalidExpertNameError: If an expert of that name is in memory, or it is no name.
            NotAPackageError, DamagedFileError, NonFiniteTensorError: If the package cannot be trusted.
            ConfigurationError: If the model is quantised, offloaded or spread over processes, or one of its experts is
                being trained.
        """
        refuse_spread(self.mixtures, "take in another expert")
        type(self).package_adder(self, package, name)

    def new_expert(self, name: str, like: str = PUBLIC, *, row: Any = None, bias_start: float | None = None) -> None:
        """Put a new expert, a copy of another one, beside those in memory, to be trained.

        `freeze_except(model, name)` then lets it move and nothing else. It takes part at once where all experts do;
        where a set is in force, that set stays in force.

        Args:
            name: What to call it.
            like: Which expert to copy.
            row: Its router row, ``(H,)`` for all layers or ``(L, H)``, or what `domain_embedding` returns; default
                zero, the neutral row.
            bias_start: Where its bias starts, at most 0; default `BIAS_START` where the router has biases, and none
                elsewhere. A number gives a router without biases some, which are 0 for the other experts.

        Raises:
            InvalidExpertNameError, DuplicateExpertError: If it is no name, or an expert of the checkpoint has it.
            UnknownExpertError, ExpertNotLoadedError: If the expert to copy is not in memory.
            ConfigurationError: If row or bias cannot be used, or the model is quantised, offloaded or in training.
            RouterProjectionError: If the row was made from text in another way than the model's.
        """
        # That module builds on this one.
        from flexolmo_hf.modeling.new_expert import insert_copy

        insert_copy(self, name, like, row, bias_start)

    def remove_expert(self, name: str) -> None:
        """Take an expert out of memory, as if it had been left out when the model was loaded.

        Args:
            name: Which.

        Raises:
            UnknownExpertError, ExpertNotLoadedError: If there is none of that name in memory.
            EmptyExpertSetError: If no expert would remain.
            ConfigurationError: If none of the set in force would remain, the model is offloaded or one of its experts
                being trained, or it is the public expert and low-rank ones are relative to it.
        """
        at = self.expert_position(name)
        everything, active = self.expert_names, self.active_experts
        remaining = [other for other in everything if other != name]
        still_active = remaining if active == everything else [other for other in active if other != name]
        if not remaining:
            raise EmptyExpertSetError(everything)
        if not still_active:
            raise ConfigurationError(
                f"Without {name!r}, no expert of the set in force ({active}) would remain.",
                "Choose another set first: model.set_active_experts([...]).",
            )
        self._refuse_while_training()
        if any(mixture.gate.weight.is_meta and hasattr(mixture.gate, "_hf_hook") for mixture in self.mixtures):
            # Hooks would bring back the rows of all experts from the disk.
            raise ConfigurationError(
                "Experts cannot be removed from a model that is offloaded.",
                f"Load it again without {name!r}: from_pretrained(..., active_experts={remaining}).",
            )
        index = str(self.expert_indices[at])
        if index == "0":
            self._refuse_while_relative(name)
        with self._changing_experts():
            for mixture in self.mixtures:
                del mixture.experts[index]
                mixture.gate.remove_row(at)
                mixture.repack()
        self._forgotten |= {name}
        self._experts_in_memory_changed(still_active)

    def load_expert(self, name: str, *, token: str | None = None) -> None:
        """Bring an expert into memory that was left out at load time, or removed, from where it lies.

        It takes part at once where all experts do; where a set is in force, that set stays in force.

        Args:
            name: Which of the checkpoint's, or of those added from a folder or repository before.
            token: For a repository on the Hub that is not public; it is not kept.

        Raises:
            UnknownExpertError: If the checkpoint has no such expert.
            ConfigurationError: If it is in memory already, it is not known where it lies, or the model is quantised,
                offloaded or in training.
            IncompleteCheckpointError, DamagedFileError, CheckpointNotFoundError: If it cannot be read there.
        """
        (name,) = parse_expert_set([name], self.config.expert_names)
        if name in self.expert_names:
            raise ConfigurationError(
                f"Expert {name!r} is in memory already.", "set_active_experts puts it in force; a call can name it too."
            )
        home = self._homes.get(name)
        if home is not None:
            self.add_expert(home, name)
            return
        if self.source is None:
            raise ConfigurationError(
                f"Expert {name!r} lies nowhere that is known: this model was not loaded from a checkpoint with it.",
                "Add it with model.add_expert(package), or load a checkpoint that has it.",
            )
        self._refuse_special_weights()
        index = self.config.expert_names.index(name)
        with named_errors(self.source.path, self.source.subfolder):
            folder = self.source.fetch(name, token)
            parts, form = _read_expert(folder, name, index, self.config, self.source.variant)
            former = read_router_base(folder, [name])
        self.insert_expert(name, parts, form)
        self.router_base = former if self.router_base is None else self.router_base.joined_with(former)

    # Whoever lets an expert come may be in inference mode; what is made in it could not be trained.
    @torch.inference_mode(False)
    def insert_expert(self, name: str, parts: list[LayerParts], form: Mapping[str, int] | None = None) -> None:
        """Insert an expert whose tensors are at hand; `add_expert` and `load_expert` check and end here.

        Args:
            name: Its name; one that `config` lists keeps its index, a new one becomes the last.
            parts: Its tensors by layer. Those that have the model's dtype and device are used as they are, uncopied,
                unless they were made in inference mode.
            form: As in `FlexOlmoConfig.expert_forms`; nothing for a full expert.

        Raises:
            ConfigurationError: If the model is quantised, offloaded or being trained, or a low-rank expert has no
                public one to be relative to.
        """
        self._refuse_special_weights()
        everything, active = self.expert_names, self.active_experts
        # Whatever can fail, does so before anything is changed.
        experts = [self._expert_of(part, mixture, form) for mixture, part in zip(self.mixtures, parts, strict=True)]
        with self._changing_experts():
            index = self._index_for(name)
            forms = {other: known for other, known in self.config.expert_forms.items() if other != name}
            self.config.expert_forms = {**forms, name: dict(form)} if form else forms
            at = sum(other < index for other in self.expert_indices)
            if any(part.bias is not None for part in parts):
                self._give_biases()
            for mixture, expert, part in zip(self.mixtures, experts, parts, strict=True):
                present: dict[str, nn.Module] = {**dict(mixture.experts.items()), str(index): expert}
                mixture.experts = nn.ModuleDict({key: present[key] for key in sorted(present, key=int)})
                mixture.gate.insert_row(at, part.row, part.bias)
                mixture.repack()
        if self.router_base is not None:
            self.router_base = self.router_base.without(name)
        if name in self._forgotten:
            # The name may now mean other weights: caches filled before must not be continued.
            self.base_model._identity = Stamp()  # type: ignore[attr-defined]
        self._experts_in_memory_changed(self.expert_names if active == everything else active)

    def _expert_of(self, part: LayerParts, mixture: FlexOlmoMixture, form: Mapping[str, int] | None) -> nn.Module:
        with torch.device("meta"):
            expert = build_expert(self.config, form, mixture.public) if form else FlexOlmoExpert(self.config)
        like = mixture.gate.weight
        own = {key: tensor.clone() if tensor.is_inference() else tensor for key, tensor in part.matrices.items()}
        state = {key: tensor.to(like.device, like.dtype) for key, tensor in own.items()}
        expert.load_state_dict(state, assign=True)
        return expert.train(mixture.training)

    def _index_for(self, name: str) -> int:
        config = self.config
        if name in config.expert_names:
            return config.expert_names.index(name)
        if config.num_experts_per_tok == config.num_experts:
            config.num_experts_per_tok += 1
        config.num_experts += 1
        config.expert_names = [*config.expert_names, name]
        return config.num_experts - 1

    def _give_biases(self) -> None:
        for mixture in self.mixtures:
            if mixture.gate.bias is None:
                mixture.gate.bias = nn.Parameter(torch.zeros_like(mixture.gate.weight[:, 0]))
        self.config.router_bias = True

    def _refuse_special_weights(self) -> None:
        self._refuse_while_training()
        refuse_spread(self.mixtures, "take in another expert")
        if getattr(self, "hf_quantizer", None) is not None or any(m.gate.weight.is_meta for m in self.mixtures):
            raise ConfigurationError(
                "Experts cannot be inserted into a model that is quantised or offloaded.",
                "Load it again with the experts that are wanted: from_pretrained(..., active_experts=[...]).",
            )

    def _refuse_while_relative(self, name: str) -> None:
        experts = zip(self.expert_names, self.mixtures[0].experts.values(), strict=True)
        if relative := [other for other, expert in experts if isinstance(expert, LowRankExpert)]:
            raise ConfigurationError(
                f"The low-rank experts {relative} are differences to {name!r}, so it cannot leave the memory.",
                "Switch it off with set_active_experts([...]) instead, or remove them first.",
            )

    def _refuse_while_training(self) -> None:
        if any(mixture.gate.trained_position is not None for mixture in self.mixtures):
            raise ConfigurationError(
                "One of the experts is being trained, with its router row apart from the others'.",
                "End the training first: flexolmo_hf.unfreeze(model).",
            )


def _read_expert(
    folder: Path, name: str, index: int, config: FlexOlmoConfig, variant: str | None
) -> tuple[list[LayerParts], dict[str, int] | None]:
    """Read one expert's tensors, mapped from their files where these allow it, and its form."""
    stored = FlexOlmoConfig.from_pretrained(folder, active_experts=None)
    if name not in stored.expert_names or stored.expert_names.index(name) != index:
        raise IncompleteCheckpointError([f"expert {name!r} with index {index}"])
    read = _reader(folder, stored, variant)
    form = stored.expert_forms.get(name)
    shapes = tensor_shapes(config.hidden_size, config.intermediate_size, form)
    layers = []
    for layer in range(config.num_hidden_layers):
        at = f"layers.{layer}.mlp"
        matrices = {key: read(f"{at}.experts.{index}.{key}") for key in shapes}
        if wrong := [key for key, tensor in matrices.items() if tuple(tensor.shape) != shapes[key]]:
            raise IncompleteCheckpointError([], [f"{at}.experts.{index}.{key}" for key in wrong])
        bias = read(f"{at}.gate.bias")[index : index + 1].clone() if stored.router_bias else None
        layers.append(LayerParts(matrices, read(f"{at}.gate.weight")[index].clone(), bias))
    return layers, form


def _reader(folder: Path, config: FlexOlmoConfig, variant: str | None) -> Callable[[str], torch.Tensor]:
    single, index = weight_files(config, variant)
    files: dict[str, str] = {}
    if single is None or not (folder / single).is_file():
        files = read_weight_map(folder / str(index)) if index and (folder / index).is_file() else {}

    def read(name: str) -> torch.Tensor:
        # A checkpoint of the backbone alone has no prefix.
        for key in (f"model.{name}", name):
            file = files.get(key) if files else single
            if file is None:
                continue
            with safe_open(folder / file, framework="pt") as opened:
                if key in opened.keys():  # noqa: SIM118 (not a mapping)
                    return opened.get_tensor(key)
        raise IncompleteCheckpointError([name])

    return read
