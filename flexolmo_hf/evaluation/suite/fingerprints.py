"""What was measured, told by hashes, so that a table can be traced to the weights it came from."""

import hashlib
import json

from transformers import PreTrainedModel

from flexolmo_hf.composition.fingerprint import fingerprint_of
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.hashing import hash_tensor
from flexolmo_hf.modeling.names import PUBLIC
from flexolmo_hf.modeling.set_key import ExpertSetKeys

# A model's place and the set in force are no part of it.
_BESIDE_THE_POINT = ("_name_or_path", "active_experts", "dtype", "transformers_version")


def model_fingerprint(model: PreTrainedModel) -> str:
    """Hash a model's settings and all its weights, as they are in memory.

    Returns:
        64 hexadecimal digits.
    """
    settings = {key: value for key, value in model.config.to_dict().items() if key not in _BESIDE_THE_POINT}
    tensors = {name: hash_tensor(tensor) for name, tensor in model.state_dict().items()}
    return hashlib.sha256(json.dumps([settings, tensors], sort_keys=True, default=str).encode()).hexdigest()


def anchor_digest(model: PreTrainedModel) -> str | None:
    """Return the digest that packages name their anchor by; None if the public expert is not in the model."""
    if not isinstance(model, ExpertSets) or PUBLIC not in model.expert_names:
        return None
    return fingerprint_of(model).digest


def set_fingerprint(model: PreTrainedModel, of_the_model: str) -> str:
    """Name what the set in force computes.

    Args:
        model: The model.
        of_the_model: Its `model_fingerprint`, returned for a model without experts.
    """
    return str(model.expert_set_key()) if isinstance(model, ExpertSetKeys) else of_the_model
