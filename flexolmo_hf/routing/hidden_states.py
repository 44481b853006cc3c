"""The anchor as an encoder: a text's embedding is the mean of what the routers see while it is read.

Shape letters: B texts, T tokens, H hidden, L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import Olmo2Config, Olmo2ForCausalLM

from flexolmo_hf.errors import ConfigurationError, NotOlmo2Error
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import PUBLIC

#: Makes something of a layer's input ``(B, T, H)`` and of which tokens are real ``(B, T)``.
Keep = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class HiddenStates:
    """Embeds texts by the residual stream of an OLMo-2 model, or of a FlexOlmo model with the public expert alone.

    What is averaged over a text's tokens is the input of each layer's feed-forward part: the very vectors that a router
    in its place multiplies with its rows.
    """

    def __init__(self, model: Any, tokenizer: Any, *, per_layer: bool = False, max_length: int = 512):
        """Take a model as the encoder.

        Args:
            model: An `Olmo2ForCausalLM` or `FlexOlmoForCausalLM`.
            tokenizer: Its tokenizer.
            per_layer: Whether each layer has an embedding of its own; else they are averaged.
            max_length: Tokens of each text that are read, from its beginning.

        Raises:
            ConfigurationError: If there is no model or no tokenizer.
            NotOlmo2Error: If the model is of another architecture.
            UnknownExpertError, ExpertNotLoadedError: If it has no public expert in memory.
        """
        if model is None or tokenizer is None:
            raise ConfigurationError(
                "The anchor's own hidden states need the anchor, and model or tokenizer is not given.",
                "Give model= and tokenizer=, or another encoder.",
            )
        self.is_flexolmo = isinstance(model, ExpertSets)
        is_dense = isinstance(model, Olmo2ForCausalLM) and model.config.model_type == Olmo2Config.model_type
        if not (self.is_flexolmo or is_dense):
            raise NotOlmo2Error(getattr(getattr(model, "config", None), "model_type", None))
        if self.is_flexolmo:
            model.expert_position(PUBLIC)
        self.model, self.tokenizer, self.per_layer = model, tokenizer, per_layer
        self.max_length = min(max_length, model.config.max_position_embeddings)

    @property
    def hidden_size(self) -> int:
        """Width of the embeddings."""
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed texts.

        Returns:
            ``(B, H)``, or ``(B, L, H)`` with an embedding per layer, float32. A text without tokens has NaN.
        """
        means = self._read(texts, _mean)
        embeddings_BLH = torch.stack(means, dim=1)
        return embeddings_BLH if self.per_layer else embeddings_BLH.mean(dim=1)

    @torch.no_grad()
    def of_tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Return what each layer's router would see of every token.

        Returns:
            ``(N, L, H)`` for the N tokens of all texts, one text after the other, float32 on the CPU.
        """
        return torch.stack(self._read(texts, _every), dim=1)

    def _read(self, texts: Sequence[str], keep: Keep) -> list[torch.Tensor]:
        """Read texts, and return what `keep` makes of each layer's input."""
        ids_BT, mask_BT = self._tokens(texts)
        active = {"active_experts": [PUBLIC]} if self.is_flexolmo else {}
        was_training = self.model.training
        self.model.eval()
        try:
            with self._watched(mask_BT.bool(), keep) as kept:
                # The backbone alone: nothing is predicted, so no logits are needed.
                self.model.model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **active)
        finally:
            self.model.train(was_training)
        return kept

    def _tokens(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        cut = {"truncation": True, "max_length": self.max_length, "add_special_tokens": False}
        tokens = self.tokenizer(list(texts), padding=False, **cut)["input_ids"]
        shape = (len(tokens), max(1, *map(len, tokens)))
        # Padding stands behind the text, where no token of it looks, and is left out of the mean.
        ids_BT, mask_BT = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for row, ids in enumerate(tokens):
            ids_BT[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
            mask_BT[row, : len(ids)] = 1
        return ids_BT.to(self.model.device), mask_BT.to(self.model.device)

    @contextmanager
    def _watched(self, real_BT: torch.Tensor, keep: Keep) -> Iterator[list[torch.Tensor]]:
        kept: list[torch.Tensor] = []

        def watch(module: torch.nn.Module, given: tuple[Any, ...]) -> None:
            kept.append(keep(given[0].float(), real_BT.to(given[0].device)).cpu())

        hooks = [layer.mlp.register_forward_pre_hook(watch) for layer in self.model.model.layers]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()


def _mean(states_BTH: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    sums_BH = torch.where(real_BT.unsqueeze(-1), states_BTH, 0.0).sum(dim=1)
    return sums_BH / real_BT.sum(dim=1, keepdim=True)


def _every(states_BTH: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    return states_BTH[real_BT]
