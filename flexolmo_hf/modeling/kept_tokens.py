"""The last layer's mixture, run for those tokens alone whose logits are asked for.

What a token's mixture computes is read by the next layer's attention, and after the last layer by the head. Before
generation a prompt has one token whose logits are read: the last layer's mixture need not run for the others. Attention
still runs for all, since every key and value goes into the cache.

Shape letters: B batch, T tokens, n tokens that are kept, H hidden.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as modules
from transformers import activations
from transformers.modeling_utils import slice_logits_to_keep
from transformers.models.flex_olmo import modeling_flex_olmo as upstream

from flexolmo_hf.modeling.expert import FlexOlmoExpert
from flexolmo_hf.modeling.few_rows import FewRowsLinear
from flexolmo_hf.modeling.low_rank import LowRankDifference, LowRankExpert, NarrowExpert
from flexolmo_hf.modeling.mixture import FlexOlmoMixture
from flexolmo_hf.modeling.norm import FlexOlmoRMSNorm
from flexolmo_hf.modeling.router import FlexOlmoRouter
from flexolmo_hf.modeling.untouched import is_recording, is_untouched

# The classes that work on each token by itself, and what runs them: some libraries replace that for a whole class.
_BY_TOKEN: dict[type[nn.Module], Any] = {}


def works_by_token(*classes: type[nn.Module]) -> None:
    """Vouch for modules of exactly these classes: what they return for a token depends on no other token."""
    _BY_TOKEN.update({made: made.forward for made in classes})


works_by_token(FlexOlmoMixture, FlexOlmoRouter, FlexOlmoExpert, NarrowExpert, LowRankExpert, LowRankDifference)
works_by_token(FewRowsLinear, FlexOlmoRMSNorm, nn.ModuleDict, upstream.FlexOlmoModel)


class KeptTokens:
    """The tokens of one call whose logits are asked for.

    Attributes:
        done: Whether the last layer has left the others out.
    """

    def __init__(self, backbone: Any, which: int | torch.Tensor):
        """Take note of a call.

        Args:
            backbone: The model below the head.
            which: As upstream's ``logits_to_keep``.
        """
        self._backbone = backbone
        self._which = which
        self.done = False

    def leave_others_out(self, layer: Any, tokens: int) -> bool:
        """Tell whether a layer may leave the other tokens out after its attention, and note that it does.

        Args:
            layer: Any layer; only the last one may.
            tokens: How many tokens each row has, T.

        Returns:
            False where nothing would be left out, or others would be missed: in outputs that are recorded, by a
            compiler, by hooks, and by modules or functions of others in the place of those that follow.
        """
        if torch.compiler.is_compiling() or not self._is_last(layer) or not 0 < self._count(tokens) < tokens:
            return False
        if modules._global_forward_hooks or modules._global_forward_pre_hooks or is_recording():
            return False
        norms = (layer.post_attention_layernorm, layer.post_feedforward_layernorm, self._backbone.norm)
        those_that_see = (layer, *layer.mlp.modules(), *norms, self._backbone)
        self.done = all(made.forward is forward for made, forward in _BY_TOKEN.items()) and all(
            _is_by_token(module) and is_untouched(module.__dict__) for module in those_that_see
        )
        return self.done

    def _is_last(self, layer: Any) -> bool:
        layers, count = self._backbone.layers, self._backbone.config.num_hidden_layers
        if layer is not layers[min(count, len(layers)) - 1]:
            return False
        # Somebody may have put one layer in several places.
        return sum(one is layer for one in layers) == 1

    def _count(self, tokens: int) -> int:
        if isinstance(self._which, torch.Tensor) and self._which.ndim == 1:
            return len(self._which)
        # Positions of its own for each row, and masks, are left to where the logits are made.
        return self._which if isinstance(self._which, int) else tokens

    def of(self, hidden_BTH: torch.Tensor) -> torch.Tensor:
        """Return the kept tokens, ``(B, n, H)``."""
        return slice_logits_to_keep(hidden_BTH, self._which)


def _is_by_token(module: nn.Module) -> bool:
    made = type(module)
    return made in _BY_TOKEN or made.__module__ in (activations.__name__, nn.modules.activation.__name__)
