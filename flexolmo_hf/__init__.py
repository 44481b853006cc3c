"""FlexOlmo for Hugging Face Transformers: named experts, exact opt-out, and training of one expert alone.

Importing the package registers its classes with the Auto classes for `model_type` "flex_olmo"; see `register`. The
other names are imported on first use, so that loading a model needs neither TRL nor datasets.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flexolmo_hf.registration import register, unregister  # noqa: F401 (public)

try:
    __version__ = version("flexolmo-hf")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

_HOMES = {
    "AnchorMismatchError": "errors",
    "CacheExpertSetError": "errors",
    "DomainEmbedding": "routing.domain_embedding",
    "ExpertDPOConfig": "trainers.config",
    "ExpertDPOTrainer": "trainers.preference",
    "ExpertGRPOConfig": "trainers.config",
    "ExpertGRPOTrainer": "trainers.reinforcement",
    "ExpertPackage": "composition.package",
    "ExpertSFTConfig": "trainers.config",
    "ExpertSFTTrainer": "trainers.expert",
    "ExpertTrainerMixin": "trainers.mixin",
    "FineTunedClassifier": "routing.finetuning",
    "FlexOlmoConfig": "modeling.configuration",
    "FlexOlmoError": "errors",
    "FlexOlmoForCausalLM": "modeling.model",
    "FlexOlmoMixtureModel": "modeling.model",
    "ProxySelection": "routing.proxy_selection",
    "ProxySettings": "routing.proxy_settings",
    "RouterSFTConfig": "trainers.router_config",
    "RouterSFTTrainer": "trainers.router",
    "UnknownExpertError": "errors",
    "compare_rows": "routing.row_comparison",
    "describe_router": "composition.router_base",
    "domain_embedding": "routing.domain_embedding",
    "expert_state": "trainers.sharded",
    "expert_targets": "modeling.adapters",
    "export_checkpoint": "composition.export",
    "freeze_all_but_routers": "trainers.router_freezing",
    "freeze_except": "trainers.freezing",
    "identify_experts": "composition.identify",
    "inspect_checkpoint": "composition.inspect",
    "load_embedding": "routing.embedding_file",
    "load_expert_state": "trainers.sharded",
    "merge_experts": "composition.merge",
    "plan_training": "trainers.plan",
    "rollback_router": "composition.router_base",
    "select_proxy": "routing.proxy",
    "to_low_rank": "composition.compress",
    "unfreeze": "trainers.freezing",
}

__all__ = sorted([*_HOMES, "register", "unregister"])  # noqa: PLE0605 (a test holds it)


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name.startswith(("ExpertSFT", "ExpertDPO", "ExpertGRPO", "ExpertTrainer", "RouterSFT")):
        from flexolmo_hf._extras import require

        require("train", "trl", "datasets")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return __all__


register()
