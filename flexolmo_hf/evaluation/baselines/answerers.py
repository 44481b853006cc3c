"""The experts behind a chat model: each row of a batch is computed by the one that was chosen for it.

Shape letters: B batch, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.names import PUBLIC

#: The name under which a FlexOlmo model is held, whose sets of experts answer.
MIXTURE = "mixture"


class Answerers(nn.ModuleList):
    """Differs from a list of models in that these are the dense models of experts, or one model that has them all.

    Of a FlexOlmo model, the public expert and the chosen one answer.

    Args:
        models: The dense models, or the FlexOlmo model.
        names: Names of the dense models, or `MIXTURE`.

    Raises:
        NotFlexOlmoError: If there is one model, it has no name, and it has no experts either.
    """

    def __init__(self, models: Sequence[PreTrainedModel], names: Sequence[str]):
        super().__init__(models)
        self.names, self.is_mixture = list(names), list(names) == [MIXTURE]
        if self.is_mixture and not isinstance(models[0], ExpertSets):
            raise NotFlexOlmoError(models[0].config.model_type)

    @property
    def experts(self) -> list[str]:
        """Names of the experts that may answer.

        Raises:
            ConfigurationError: If the public one is not among them.
        """
        mixture: Any = self[0]
        names = list(mixture.active_experts) if self.is_mixture else list(self.names)
        if PUBLIC not in names:
            raise ConfigurationError(
                f"There is no {PUBLIC!r} among {names}.",
                "It scores queries: name one model so.",
            )
        return names

    def parameters_per_token(self) -> int:
        """Return the parameters that a token passes through in the largest set that may answer."""
        if not self.is_mixture:
            return max(map(size_of, self))
        mixture: Any = self[0]
        own = {name: sum(map(size_of, mixture.expert_modules(name))) for name in mixture.expert_names}
        others = [size for name, size in own.items() if name != PUBLIC]
        return size_of(mixture) - sum(own.values()) + own[PUBLIC] + max(others, default=0)

    def logits(self, input_ids: torch.Tensor, inputs: Mapping[str, Any], experts: Sequence[str]) -> torch.Tensor:
        """Return the logits ``(B, T, V)`` of each row's expert.

        Args:
            input_ids: Tokens ``(B, T)``.
            inputs: What else a forward takes, each tensor with one row for each of the tokens'.
            experts: Who computes each row.
        """
        options = {**inputs, "use_cache": False}
        if self.is_mixture:
            found: torch.Tensor = self[0](input_ids, active_experts=_sets_of(experts), **options).logits
            return found
        made: list[Any] = [None] * len(experts)
        for name in dict.fromkeys(experts):
            rows = [row for row, expert in enumerate(experts) if expert == name]
            part = {key: x[rows] if isinstance(x, torch.Tensor) else x for key, x in options.items()}
            for row, logits_TV in zip(rows, self._named(name)(input_ids[rows], **part).logits, strict=True):
                made[row] = logits_TV
        return torch.stack(made)

    def generate(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, experts: Sequence[str], options: Mapping[str, Any]
    ) -> Any:
        """Continue each prompt by its expert.

        Args:
            input_ids: Prompts ``(B, T)``.
            mask: ``(B, T)``; None if there is none.
            experts: Who continues each row.
            options: As upstream's `generate`, with a ``generation_config``.

        Returns:
            As upstream. Where dense models of several rows differ, their sequences in the order of the prompts, padded
            on the right.

        Raises:
            ConfigurationError: If several models answer and more than sequences is asked for.
        """
        given = {} if mask is None else {"attention_mask": mask}
        one: Any = self[0] if self.is_mixture else self._named(experts[0])
        if self.is_mixture:
            return one.generate(input_ids, active_experts=_sets_of(experts), **given, **options)
        if len(set(experts)) == 1:
            return one.generate(input_ids, **given, **options)
        if options.get("return_dict_in_generate") or options.get("streamer") is not None:
            raise ConfigurationError(
                f"Several models answer this batch ({sorted(set(experts))}), which gives sequences and nothing else.",
                "Generate row by row, without return_dict_in_generate and streamer.",
            )
        return self._by_several(input_ids, mask, experts, options)

    def _by_several(
        self, input_ids: torch.Tensor, mask: torch.Tensor | None, experts: Sequence[str], options: Mapping[str, Any]
    ) -> torch.Tensor:
        sequences: dict[int, torch.Tensor] = {}
        for name in dict.fromkeys(experts):
            rows = [row for row, expert in enumerate(experts) if expert == name]
            given = {} if mask is None else {"attention_mask": mask[rows]}
            made = self._named(name).generate(input_ids[rows], **given, **options)
            # Several sequences of a prompt are neighbours.
            sequences |= dict(zip(rows, made.view(len(rows), -1, made.shape[-1]), strict=True))
        longest = max(rows.shape[-1] for rows in sequences.values())
        pad = self._padding(options)
        padded = [
            nn.functional.pad(rows, (0, longest - rows.shape[-1]), value=pad) for _, rows in sorted(sequences.items())
        ]
        return torch.cat(padded)

    def _padding(self, options: Mapping[str, Any]) -> int:
        first: Any = self[0]
        chosen, config = options["generation_config"], first.config
        ends = chosen.eos_token_id if chosen.eos_token_id is not None else config.eos_token_id
        first_end = ends[0] if isinstance(ends, list) else ends
        for token in (options.get("pad_token_id"), chosen.pad_token_id, config.pad_token_id, first_end):
            if token is not None:
                return int(token)
        return 0

    def _named(self, name: str) -> Any:
        return self[self.names.index(name)]


def size_of(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _sets_of(experts: Sequence[str]) -> list[list[str]]:
    return [[PUBLIC] if name == PUBLIC else [PUBLIC, name] for name in experts]
