"""Fingerprints: whether two parties hold the same public model, bit for bit, told by hashes.

The anchor of an expert is everything that stays frozen while it is trained: the shared weights, the public expert and
the public router row, with the settings that decide what is computed from them.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.expert_parallel import refuse_spread
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.hashing import hash_tensor
from flexolmo_hf.modeling.names import PUBLIC

#: Settings that change what the same weights compute.
ANCHOR_SETTINGS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "norm_topk_prob",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "vocab_size",
)

#: How the public expert's router row is called in a fingerprint, per layer.
PUBLIC_ROW = "model.layers.{layer}.mlp.gate.public_row"

_OTHER_EXPERT = re.compile(r".*\.mlp\.(experts\.(?!0\.)\d+\..*|gate\.(weight|bias))")


@dataclass(frozen=True)
class AnchorFingerprint:
    """What identifies an anchor.

    Attributes:
        settings: The values of `ANCHOR_SETTINGS`.
        tensors: sha256 of each anchor tensor, with its dtype and shape, by FlexOlmo name.
    """

    settings: dict[str, Any]
    tensors: dict[str, str]

    @property
    def digest(self) -> str:
        """One sha256 over all of it."""
        text = json.dumps([self.settings, self.tensors], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def differing_settings(self, other: "AnchorFingerprint") -> list[str]:
        """Name the settings that differ, with both values, this one's first."""
        keys = sorted({*self.settings, *other.settings})
        mine, theirs = self.settings, other.settings
        return [
            f"{key} {mine.get(key)!r} instead of {theirs.get(key)!r}"
            for key in keys
            if mine.get(key) != theirs.get(key)
        ]

    def differing_tensors(self, other: "AnchorFingerprint") -> list[str]:
        """Name the tensors that differ or that only one side has."""
        names = sorted({*self.tensors, *other.tensors})
        return [name for name in names if self.tensors.get(name) != other.tensors.get(name)]


def anchor_settings(config: FlexOlmoConfig) -> dict[str, Any]:
    """Pick the settings that belong to an anchor, as JSON would give them back."""
    values = config.to_dict()
    return json.loads(json.dumps({key: values.get(key) for key in ANCHOR_SETTINGS}))


def fingerprint_anchor(
    config: FlexOlmoConfig,
    names: Iterable[str],
    tensor: Callable[[str], torch.Tensor],
    public_rows: Mapping[int, torch.Tensor],
) -> AnchorFingerprint:
    """Hash an anchor, one tensor in memory at a time.

    Args:
        config: The model's configuration.
        names: All tensor names of the model; those of other experts and the router's matrix are passed over.
        tensor: Gives a tensor by name.
        public_rows: The public expert's router row ``(H,)`` by layer.
    """
    kept = sorted(name for name in names if is_anchor_tensor(name, config))
    hashes = {name: hash_tensor(tensor(name)) for name in kept}
    hashes |= {PUBLIC_ROW.format(layer=layer): hash_tensor(row) for layer, row in public_rows.items()}
    return AnchorFingerprint(anchor_settings(config), hashes)


def fingerprint_of(model: ExpertSets) -> AnchorFingerprint:
    """Hash the anchor within a model that holds the public expert as its first.

    Raises:
        ExpertNotLoadedError: If the public expert was left out at load time.
        ConfigurationError: If the experts are spread over processes.
    """
    refuse_spread(model.mixtures, "be fingerprinted")
    public = model.expert_position(PUBLIC)
    state = model.state_dict()  # type: ignore[attr-defined]
    rows = {layer: mixture.gate.rows()[0][public].detach() for layer, mixture in enumerate(model.mixtures)}
    return fingerprint_anchor(model.config, state, state.__getitem__, rows)


def is_anchor_tensor(name: str, config: FlexOlmoConfig) -> bool:
    """Tell whether a checkpoint tensor belongs to the anchor as it stands."""
    if config.tie_word_embeddings and name == "lm_head.weight":
        return False
    return _OTHER_EXPERT.fullmatch(name) is None
