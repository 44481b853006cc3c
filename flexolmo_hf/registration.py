"""Make the Auto classes answer with this package's classes for `model_type` "flex_olmo", and take it back."""

from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flexolmo_hf.modeling.adapters import keep_targets_as_written
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.files.checkpoint import register_weight_mapping
from flexolmo_hf.modeling.live import LiveExperts
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM, FlexOlmoMixtureModel


def _add_package(model: LiveExperts, package: Any, name: str | None) -> None:
    from flexolmo_hf.composition.live import add_package

    add_package(model, package, name)


_AUTO_MODELS = {AutoModel: FlexOlmoMixtureModel, AutoModelForCausalLM: FlexOlmoForCausalLM}


def register() -> None:
    """Take over "flex_olmo" in this process; done on ``import flexolmo_hf``.

    The stock classes remain usable by name (``transformers.FlexOlmoForCausalLM``) and load as before.
    """
    register_weight_mapping(FlexOlmoMixtureModel.__name__)
    keep_targets_as_written()
    LiveExperts.package_adder = staticmethod(_add_package)
    AutoConfig.register(FlexOlmoConfig.model_type, FlexOlmoConfig, exist_ok=True)
    for auto_class, model_class in _AUTO_MODELS.items():
        auto_class.register(FlexOlmoConfig, model_class, exist_ok=True)


def unregister() -> None:
    """Give "flex_olmo" back to the stock classes in this process; `register` takes it over again."""
    # transformers has no public way back; `register` only writes into these two tables.
    CONFIG_MAPPING._extra_content.pop(FlexOlmoConfig.model_type, None)
    for auto_class in _AUTO_MODELS:
        auto_class._model_mapping._extra_content.pop(FlexOlmoConfig, None)
