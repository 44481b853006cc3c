"""How much of a text each expert has worked on: the weights by which the mixtures multiply the experts' outputs.

They are those of the forward pass itself: upstream's recorder keeps the routers' logits, for the thread that asks and
no other, and the mixture's own functions turn them into weights. Neither the head nor a second pass is needed.

Shape letters: B batch, T tokens, L layers, E columns (experts), N = B*T of one piece.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.mixture import choose, spread
from flexolmo_hf.modeling.selection import Selection
from flexolmo_hf.modeling.token_input import read_tokens


@dataclass(frozen=True, eq=False)
class Attribution:
    """The experts' part in some rows of tokens. It holds neither tokens nor text.

    A share is the part of the routing mass that went to an expert: each token's weights, made to sum to 1, averaged
    over tokens and layers. All shares of one dictionary sum to 1.

    Attributes:
        experts: Names of the columns, in checkpoint order: the set; where rows use different sets, all in memory.
        tokens: Tokens counted. Padding is not.
        shares: Each expert's share of all tokens.
        shares_per_row: The same for each row of the batch.
        shares_per_layer: The same for each layer, first layer first.
        weights: What each expert's output was multiplied by, ``(B, T, L, E)``, float32, on the CPU; 0 for an expert
            that the token did not choose or its row may not use, and for padding. None if not asked for.
    """

    experts: list[str]
    tokens: int
    shares: dict[str, float]
    shares_per_row: list[dict[str, float]]
    shares_per_layer: list[dict[str, float]]
    weights: torch.Tensor | None = field(default=None, repr=False)

    def to_dict(self, *, with_weights: bool = False) -> dict[str, Any]:
        """Return plain lists, dictionaries and numbers, ready for JSON.

        Args:
            with_weights: Whether to include the weights, as nested lists; they are many. None if there are none.
        """
        plain = {
            "experts": list(self.experts),
            "tokens": self.tokens,
            "shares": dict(self.shares),
            "shares_per_row": [dict(shares) for shares in self.shares_per_row],
            "shares_per_layer": [dict(shares) for shares in self.shares_per_layer],
        }
        if with_weights:
            plain["weights"] = None if self.weights is None else self.weights.tolist()
        return plain

    def __str__(self) -> str:
        ranked = sorted(self.shares.items(), key=lambda item: -item[1])
        width = max(len(name) for name in self.experts)
        lines = [f"{name:<{width}}  {share:6.1%}" for name, share in ranked]
        return "\n".join([*lines, f"{self.tokens} tokens, {len(self.shares_per_layer)} layers"])


class Attributable(ExpertSets):
    """A model that says which experts worked on a text."""

    generation_config: Any
    training: bool

    @torch.no_grad()
    def attribution(
        self,
        input_ids: Any,
        attention_mask: torch.Tensor | None = None,
        *,
        active_experts: Any = None,
        per_token: bool = True,
        chunk_size: int = 2048,
    ) -> Attribution:
        """Measure how much each expert works on some tokens, in one forward pass without the head.

        Args:
            input_ids: Token ids ``(B, T)`` or ``(T,)``; what a tokenizer returns; or what `generate` returns with
                ``return_dict_in_generate=True``. Of the latter, only the sequences are read, and what fills up finished
                rows is left out.
            attention_mask: 0 where there is padding, ``(B, T)``. For an output of `generate`, the mask of the prompts
                ``(B, tokens of the prompt)`` will do.
            active_experts: As in `forward`. None for the set in force now, whatever set was in force when the tokens
                were generated.
            per_token: Whether to keep each token's weights. If not, memory does not grow with them.
            chunk_size: Tokens of a row that run at once. Longer rows run in pieces, with a key-value cache.

        Returns:
            Weights and shares.

        Raises:
            ConfigurationError: If the tokens or the mask are not what they should be.
            FlexOlmoError: As `forward` does for a set that is none of this model's.
        """
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
            raise ConfigurationError(f"chunk_size is {chunk_size!r}.", "Give the number of tokens, at least 1.")
        ids_BT, real_BT = read_tokens(input_ids, attention_mask, self.config, self.generation_config)
        selection = self.select_experts(active_experts, len(ids_BT))
        experts = self.expert_names if selection.per_row else list(selection.names[0])
        real_on_cpu = real_BT.cpu()
        shape_LE = (len(self.mixtures), len(experts))
        # On the CPU and in these dtypes whatever torch's defaults are.
        mass_BLE = torch.zeros(len(ids_BT), *shape_LE, dtype=torch.float64, device="cpu")
        weights_BTLE = torch.empty(*ids_BT.shape, *shape_LE, dtype=torch.float32, device="cpu") if per_token else None
        start = 0
        with _evaluating(self):
            for piece_BTLE in self._weights(ids_BT, real_BT, selection, chunk_size):
                end = start + piece_BTLE.shape[1]
                padding = ~real_on_cpu[:, start:end, None, None]
                # Filled, not multiplied: what a model computes at a padding token may be NaN.
                if weights_BTLE is not None:
                    weights_BTLE[:, start:end] = piece_BTLE.masked_fill(padding, 0)
                shares_BTLE = piece_BTLE / piece_BTLE.sum(dim=-1, keepdim=True)
                mass_BLE += shares_BTLE.masked_fill_(padding, 0).sum(dim=1, dtype=torch.float64)
                start = end
        return _summary(experts, mass_BLE, real_on_cpu.sum(dim=1), weights_BTLE)

    def _weights(
        self, ids_BT: torch.Tensor, real_BT: torch.Tensor, selection: Selection, chunk_size: int
    ) -> Iterator[torch.Tensor]:
        """Run the backbone and yield the weights ``(B, t, L, E)`` of each piece of t tokens, float32, on the CPU."""
        tokens = ids_BT.shape[1]
        padded = not real_BT.all()
        positions_BT = (real_BT.long().cumsum(-1) - 1).masked_fill(~real_BT, 0) if padded else None
        cache: Cache | None = DynamicCache(config=self.config) if tokens > chunk_size else None
        for start in range(0, tokens, chunk_size):
            end = min(start + chunk_size, tokens)
            outputs = self.base_model(  # type: ignore[attr-defined]
                input_ids=ids_BT[:, start:end],
                attention_mask=real_BT[:, :end].long() if padded else None,
                position_ids=None if positions_BT is None else positions_BT[:, start:end],
                past_key_values=cache,
                use_cache=cache is not None,
                active_experts=selection,
                output_router_logits=True,
                output_hidden_states=False,
                output_attentions=False,
                return_dict=True,
            )
            weights_LNE = self._mixed_by(outputs.router_logits, selection)
            # The mixture multiplies in the dtype of its input, which rounds the weights.
            weights_LNE = weights_LNE.to(outputs.last_hidden_state.dtype).float().cpu()
            yield weights_LNE.unflatten(1, (len(ids_BT), end - start)).permute(1, 2, 0, 3)

    def _mixed_by(self, logits: tuple[torch.Tensor, ...], selection: Selection) -> torch.Tensor:
        """Turn each layer's logits ``(N, E)`` into the weights of its mixture, ``(L, N, E)`` float32."""
        if len(logits) != len(self.mixtures):
            raise ConfigurationError(
                "The routers were not recorded: another thread is compiling a model, which upstream's recorder does "
                "not bear.",
                "Call again when it has compiled.",
            )
        # Layers may stand on different devices.
        probs_LNE = torch.stack([layer.to(logits[0].device) for layer in logits]).softmax(dim=-1, dtype=torch.float32)
        per_token = min(self.config.num_experts_per_tok, selection.widest)
        if per_token == selection.widest:
            return probs_LNE
        chosen = choose(probs_LNE.flatten(0, 1), per_token=per_token, normed=self.config.norm_topk_prob)
        return spread(*chosen, experts=probs_LNE.shape[-1]).view_as(probs_LNE)


def _summary(
    experts: list[str], mass_BLE: torch.Tensor, tokens_B: torch.Tensor, weights_BTLE: torch.Tensor | None
) -> Attribution:
    def named(shares_E: torch.Tensor) -> dict[str, float]:
        return dict(zip(experts, shares_E.tolist(), strict=True))

    tokens, layers = int(tokens_B.sum()), mass_BLE.shape[1]
    return Attribution(
        experts=experts,
        tokens=tokens,
        shares=named(mass_BLE.sum(dim=(0, 1)) / (tokens * layers)),
        shares_per_row=[named(row) for row in mass_BLE.sum(dim=1) / (tokens_B[:, None] * layers)],
        shares_per_layer=[named(layer) for layer in mass_BLE.sum(dim=0) / tokens],
        weights=weights_BTLE,
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Leave out what only training does, such as dropout, and checkpointing, which would drop the cache."""
    training = [module for module in model.modules() if module.training] if model.training else []
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
