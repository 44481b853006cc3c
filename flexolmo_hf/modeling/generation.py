"""Generation with sets of experts: one per call or one per row, through every decoding mode.

The set is resolved once, at the start, and travels with the other inputs of the model. A switch of the set in force
while text is being generated, by another thread or a callback, does not reach a running generation.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from flexolmo_hf.errors import ConfigurationError, EmptyExpertSetError
from flexolmo_hf.modeling.expert_sets import ExpertSets
from flexolmo_hf.modeling.selection import Selection


class SetsInGeneration(ExpertSets):
    """`generate` that takes ``active_experts``."""

    __call__: Callable[..., Any]
    generation_config: Any

    def generate(
        self, inputs: torch.Tensor | None = None, *args: Any, active_experts: Any = None, **kwargs: Any
    ) -> Any:
        """Generate as upstream does, with the experts of this call.

        Args:
            inputs: As upstream.
            *args: As upstream.
            active_experts: As in `forward`; one set per row means per prompt, whatever the number of beams or of
                returned sequences.
            **kwargs: As upstream.

        Returns:
            As upstream.

        Raises:
            FlexOlmoError: As `forward` does.
            ConfigurationError: If continuous batching is asked to serve a set of its own, or a set stands in a
                `GenerationConfig`.
        """
        self._refuse_in_settings(kwargs.get("generation_config", args[0] if args else None))
        if kwargs.get("cache_implementation") == "paged":
            if active_experts is not None:
                self._refuse_continuous_batching()
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        given = next((x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
        selection = self.select_experts(active_experts, None if given is None else given.shape[0])
        # The cache is compared with it before the first forward; the compiled ones after it need not.
        selection = replace(selection, checked=True)
        return super().generate(inputs, *args, active_experts=selection, **kwargs)  # type: ignore[misc]

    def generate_batch(self, *args: Any, active_experts: Any = None, **kwargs: Any) -> Any:
        """Generate with continuous batching as upstream does, with the set in force.

        Raises:
            ConfigurationError: If a set is given, also in a `GenerationConfig`, or the manager shall outlive the call:
                requests of all sets would share one paged cache.
        """
        self._refuse_in_settings(kwargs.get("generation_config"), *args)
        if active_experts is not None or kwargs.get("persistent_manager"):
            self._refuse_continuous_batching()
        # What is raised in the thread that serves would be a line in its log.
        self.refuse_set_by_hand()
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def _refuse_in_settings(self, *given: Any) -> None:
        # Upstream would take the keyword of the call for a change to these settings, and no set would reach the model.
        for settings in (*given, self.generation_config):
            if isinstance(settings, GenerationConfig) and getattr(settings, "active_experts", None) is not None:
                raise ConfigurationError(
                    "active_experts stands in a GenerationConfig, which is not where experts are chosen.",
                    "Take it out there and give it to the call: model.generate(..., active_experts=[...]).",
                )

    @staticmethod
    def _refuse_continuous_batching() -> None:
        raise ConfigurationError(
            "Continuous batching shares one paged cache among requests, so it serves the set in force only, and no "
            "longer than a call.",
            "Choose the set with model.use_experts(...) around the call, or use another cache_implementation.",
        )

    def _prefill(
        self, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        # Here, where rows are already expanded: what follows may be compiled, which cannot look at a cache.
        cache, selection = model_kwargs.get("past_key_values"), model_kwargs.get("active_experts")
        if cache is not None and isinstance(selection, Selection):
            self.base_model._check_cache(cache, selection)  # type: ignore[attr-defined]
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _expand_inputs_for_generation(self, expand_size: int = 1, **kwargs: Any) -> Any:
        # Beams and returned sequences of a prompt are neighbouring rows, and all have the prompt's set.
        selection = kwargs.get("active_experts")
        if isinstance(selection, Selection) and len(selection.names) > 1 and expand_size > 1:
            names = tuple(row for row in selection.names for _ in range(expand_size))
            kwargs["active_experts"] = replace(self._selection_of(names), checked=selection.checked)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)  # type: ignore[misc]

    def _get_logits_processor(self, *args: Any, model_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        processors = super()._get_logits_processor(*args, model_kwargs=model_kwargs, **kwargs)  # type: ignore[misc]
        # Guidance runs the model on a prompt of its own, and knows nothing of sets.
        for processor in processors:
            if isinstance(processor, UnbatchedClassifierFreeGuidanceLogitsProcessor):
                processor.model = partial(self.__call__, active_experts=(model_kwargs or {}).get("active_experts"))
        return processors

    def _get_candidate_generator(self, *args: Any, model_kwargs: dict[str, Any], **kwargs: Any) -> Any:
        assistant = kwargs.get("assistant_model")
        model_kwargs = dict(model_kwargs)
        selection = model_kwargs.pop("active_experts", None)
        # With an early exit the model drafts for itself; an assistant may be wrapped, by an adapter for example.
        early = kwargs["generation_config"].assistant_early_exit is not None
        modules = assistant.modules() if isinstance(assistant, nn.Module) else ()
        drafting = self if early else next((m for m in modules if isinstance(m, SetsInGeneration)), None)
        if drafting is not None and isinstance(selection, Selection):
            # Names, not the selection: upstream copies the keywords, and would copy the experts with it.
            model_kwargs["active_experts"] = _shared_with(drafting, selection)
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)  # type: ignore[misc]


def _shared_with(assistant: ExpertSets, selection: Selection) -> list[str]:
    """Choose an assistant's experts: those of the set that it holds, and never more. Assistants serve one row."""
    wanted = selection.names[0]
    shared = [name for name in assistant.expert_names if name in wanted]
    if not shared:
        raise EmptyExpertSetError(assistant.expert_names)
    return shared
