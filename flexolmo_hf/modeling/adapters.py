"""LoRA on chosen experts: how their matrices are addressed, and PEFT kept from addressing others in their place.

For every model of type "flex_olmo" PEFT rewrites targets such as ``up_proj`` or ``all-linear`` into the fused 3-D
tensors and the router matrix of the stock class: it goes by the type alone. Models with named experts have the type but
not the tensors. Their experts would not be found, and ``all-linear`` would train the router instead.
"""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from torch import nn

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import parse_expert_set

# Imported by PEFT itself only when it puts the first adapter into a model.
_CONVERSION = "peft.utils.transformers_weight_conversion"


def expert_targets(model: ExpertSets, *names: str) -> str:
    """Address the matrices of some experts, for ``LoraConfig(target_modules=...)`` and its relatives.

    The pattern holds checkpoint indices, so an adapter that was trained while some experts were left out fits the same
    checkpoint loaded with others. It is a pattern and not a list because PEFT shortens long lists to what tells their
    modules apart from the others in memory: beside no other expert, that would be ``up_proj``, everyone's.

    Args:
        model: A FlexOlmo model that holds the experts.
        *names: Which experts.

    Returns:
        A regular expression that matches the full names of their ``gate_proj``, ``up_proj`` and ``down_proj``, in every
        layer. Add others with ``|``, for example ``f"{expert_targets(model, 'math')}|.*[qv]_proj"``.

    Raises:
        UnknownExpertError: If the checkpoint has no such expert.
        ExpertNotLoadedError: If one was left out at load time.
        EmptyExpertSetError, DuplicateExpertError, ExpertTypeError: If the names are no set of names.
    """
    chosen = parse_expert_set(names, model.config.expert_names)
    indices = "|".join(str(model.expert_indices[model.expert_position(name)]) for name in chosen)
    return rf"(?:.*\.)?layers\.\d+\.mlp\.experts\.(?:{indices})\.(?:gate|up|down)_proj"


def has_adapters(model: nn.Module) -> bool:
    """Tell whether PEFT has put anything into a model; without importing PEFT."""
    homes = {"peft.tuners.tuners_utils": "BaseTunerLayer", "peft.utils.other": "AuxiliaryTrainingWrapper"}
    kinds = tuple(getattr(sys.modules[home], kind) for home, kind in homes.items() if home in sys.modules)
    return any(isinstance(module, kinds) for module in model.modules())


def keep_targets_as_written() -> None:
    """Have PEFT leave targets of models with named experts alone, at once or as soon as it is imported.

    It then also refuses to put an adapter beside weights that were left on disk (`ConfigurationError`). Nothing changes
    for models of any other class, stock FlexOlmo models included.
    """
    if _CONVERSION in sys.modules:
        _guard(sys.modules[_CONVERSION])
    elif not any(isinstance(finder, _GuardWhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _GuardWhenImported())


def _guard(conversion: ModuleType) -> None:
    # PEFT asks the type of the model and offers no other place to answer by class.
    convert: Callable[..., None] = conversion.convert_peft_config_for_transformers
    if convert.__module__ == __name__:
        return

    @wraps(convert, assigned=("__name__", "__qualname__", "__doc__"))
    def for_other_models(peft_config: Any, model: Any, conversions: Any) -> None:
        if isinstance(model, ExpertSets):
            _refuse_offloaded(model)
        else:
            convert(peft_config, model, conversions)

    conversion.convert_peft_config_for_transformers = for_other_models  # type: ignore[attr-defined]


def _refuse_offloaded(model: Any) -> None:
    # Only a model that was dispatched has a map; one that is all shapes, to be filled later, has none.
    if getattr(model, "hf_device_map", None) and any(parameter.is_meta for parameter in model.parameters()):
        raise ConfigurationError(
            "Some of the model's weights are offloaded, and an adapter beside them would be uninitialised memory.",
            "Load the model without offloading, if need be with fewer active_experts.",
        )


class _GuardWhenImported(MetaPathFinder):
    """Waits for one module: importing PEFT ourselves would make every import of this package wait for it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find the one module, and see to it when it is executed."""
        if fullname != _CONVERSION:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _GuardingLoader(spec.loader)
        return spec


class _GuardingLoader(Loader):
    def __init__(self, loader: Any):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _guard(module)
