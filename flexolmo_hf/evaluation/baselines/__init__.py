"""What FlexOlmo is compared with. Importing this package registers the baselines' model types with the Auto classes."""

from transformers import AutoConfig, AutoModelForCausalLM

from flexolmo_hf.evaluation.baselines.branch_train_merge import BranchTrainMergeForCausalLM
from flexolmo_hf.evaluation.baselines.prompt_routing import PromptRoutedForCausalLM
from flexolmo_hf.evaluation.baselines.soup import average_models
from flexolmo_hf.evaluation.baselines.weighted_soup import WeightedSoupForCausalLM

__all__ = ["BranchTrainMergeForCausalLM", "PromptRoutedForCausalLM", "WeightedSoupForCausalLM", "average_models"]

for _model in (BranchTrainMergeForCausalLM, PromptRoutedForCausalLM, WeightedSoupForCausalLM):
    AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_model.config_class, _model, exist_ok=True)
