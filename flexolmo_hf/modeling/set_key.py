"""A short name for what a set of experts computes: equal keys, equal text.

Whoever keeps prefixes of prompts for many users (vLLM's ``cache_salt``, a proxy in front of a server) salts them with
it, so that what one set of experts has computed is never served to another.
"""

import hashlib
import json
from typing import Any

import torch

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.adapters import has_adapters
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.files.hashing import hash_tensor
from flexolmo_hf.modeling.low_rank import LowRankExpert
from flexolmo_hf.modeling.selection import RowNames

# Settings that do not change what is computed from the same weights.
_BESIDE_THE_POINT = {
    "_name_or_path",
    "active_experts",
    "architectures",
    "dtype",
    "expert_forms",
    "expert_names",
    "num_experts",
    "num_experts_per_tok",
    "output_router_logits",
    "return_dict",
    "router_projection",
    "router_row_scale",
    "shared_averaged",
    "transformers_version",
    "use_cache",
}


class ExpertSetKeys(ExpertSets):
    """`expert_set_key` for a model made of `FlexOlmoMixture` layers."""

    def expert_set_key(self, active_experts: Any = None, *, refresh: bool = False) -> str | list[str]:
        """Name what a set of experts computes, by its weights.

        The key depends on the experts' names and weights, their router rows, the shared weights and the settings, and
        on nothing else: not on other experts in memory, the folder, or the process. The first call reads all these
        weights; later ones only those that have changed since.

        Args:
            active_experts: As in `forward`.
            refresh: Read everything again. Writes through ``.data`` are no change to torch; most of them are noticed by
                a sample of each tensor, but not one that leaves the sample as it was.

        Returns:
            32 hexadecimal digits; where a set per row is given, one key for each row.

        Raises:
            FlexOlmoError: As `forward` does for a set that is none of this model's.
            ConfigurationError: If the model has adapters.
        """
        if has_adapters(self.base_model):  # type: ignore[attr-defined]
            raise ConfigurationError(
                "This model has adapters, which can be switched and scaled without leaving a trace in the weights.",
                "Merge the adapter first (merge_and_unload), or keep no prefixes for it.",
            )
        if refresh:
            self.base_model._hashes = {}  # type: ignore[attr-defined]
        names: RowNames = self.select_experts(active_experts).names
        keys = {row: self._key_of(row) for row in dict.fromkeys(names)}
        per_row = len(names) > 1 or (isinstance(active_experts, list) and any(_is_set(row) for row in active_experts))
        return [keys[row] for row in names] if per_row else keys[names[0]]

    def _key_of(self, names: tuple[str, ...]) -> str:
        settings = {k: v for k, v in self.config.to_dict().items() if k not in _BESIDE_THE_POINT}
        per_token = min(self.config.num_experts_per_tok, len(names))
        parts = [settings, per_token, self._shared_hashes(), [[name, *self._expert_hashes(name)] for name in names]]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]

    def _shared_hashes(self) -> list[str]:
        named = self.named_parameters()  # type: ignore[attr-defined]
        return [f"{name} {self._hash(name, tensor)}" for name, tensor in named if ".mlp." not in name]

    def _expert_hashes(self, name: str) -> list[str]:
        at = self.expert_position(name)
        hashes = []
        for layer, (mixture, expert) in enumerate(zip(self.mixtures, self.expert_modules(name), strict=True)):
            own = dict(expert.named_parameters())
            if isinstance(expert, LowRankExpert):
                # It is a difference to the public expert's matrices, in force or not.
                own |= {f"public.{key}": tensor for key, tensor in expert.public.named_parameters()}
            hashes += [self._hash(f"{layer} {name} {key}", tensor) for key, tensor in own.items()]
            weight, bias = mixture.gate.rows()
            # A row is small, and one of several in its tensor: it is read every time.
            hashes += [hash_tensor(weight[at])] + ([] if bias is None else [hash_tensor(bias[at])])
        return hashes

    def _hash(self, key: str, tensor: torch.Tensor) -> str:
        known = self.base_model._hashes  # type: ignore[attr-defined]
        # The version of the experts too: in a copy of the model, an address is no sign of the same memory.
        state = (self.experts_version, tensor.data_ptr(), tensor._version, tensor.dtype, tensor.shape, _sample(tensor))
        if key not in known or known[key][0] != state:
            known[key] = (state, hash_tensor(tensor))
        return str(known[key][1])


def _sample(tensor: torch.Tensor) -> str:
    flat = tensor.detach().reshape(-1)
    return hash_tensor(flat[:: max(1, flat.numel() // 256)])


def _is_set(row: Any) -> bool:
    return row is None or not isinstance(row, str)
