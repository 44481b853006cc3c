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
    "BranchTrainMergeForCausalLM": "evaluation.baselines.branch_train_merge",
    "CacheExpertSetError": "errors",
    "Decontaminator": "evaluation.data.decontamination",
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
    "PromptRoutedForCausalLM": "evaluation.baselines.prompt_routing",
    "ProxySelection": "routing.proxy_selection",
    "ProxySettings": "routing.proxy_settings",
    "RouterSFTConfig": "trainers.router_config",
    "RouterSFTTrainer": "trainers.router",
    "RoutingShares": "evaluation.routing_shares.result",
    "SuiteResult": "evaluation.suite.results",
    "SuiteSettings": "evaluation.suite.settings",
    "TrainingSettings": "evaluation.baselines.training",
    "UnknownExpertError": "errors",
    "WeightedSoupForCausalLM": "evaluation.baselines.weighted_soup",
    "average_models": "evaluation.baselines.soup",
    "build_btx": "evaluation.baselines.btx",
    "build_mini": "evaluation.data.mini",
    "build_no_coordination": "evaluation.baselines.no_coordination",
    "build_recipe": "evaluation.data.recipe.build",
    "build_unrestricted_moe": "evaluation.baselines.unrestricted_moe",
    "compare_rows": "routing.row_comparison",
    "compute_matched": "evaluation.baselines.budgets",
    "contrast_embedding": "routing.contrast",
    "data_matched": "evaluation.baselines.budgets",
    "describe_router": "composition.router_base",
    "domain_embedding": "routing.domain_embedding",
    "evaluation_texts": "evaluation.data.evaluation_texts",
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
    "opt_out_matrix": "evaluation.optout.matrix",
    "plan_training": "trainers.plan",
    "project_biases": "trainers.freezing",
    "rollback_router": "composition.router_base",
    "routing_shares": "evaluation.routing_shares.shares",
    "run_offline": "evaluation.suite.offline.run",
    "run_suite": "evaluation.suite.run",
    "select_proxy": "routing.proxy",
    "suite_questions": "evaluation.suite.questions",
    "to_low_rank": "composition.compress",
    "train_btx": "evaluation.baselines.btx",
    "train_dense": "evaluation.baselines.dense",
    "train_unrestricted_moe": "evaluation.baselines.unrestricted_moe",
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
