"""The configuration: upstream's, plus the experts' names, the set in force and the router's bias."""

import os
from collections.abc import Iterable
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import FlexOlmoConfig as UpstreamFlexOlmoConfig

from flexolmo_hf.errors import ConfigurationError, NotFlexOlmoError
from flexolmo_hf.modeling.embedded_row import RouterProjection, check_scale
from flexolmo_hf.modeling.files.sidecar import with_sidecar_names
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name, default_expert_names, parse_expert_set


@strict
class FlexOlmoConfig(UpstreamFlexOlmoConfig):
    """Differs from upstream's `FlexOlmoConfig` in that experts have names and may be left out.

    Args:
        num_experts: How many experts the checkpoint holds (upstream's meaning), whether or not they are loaded.
        num_experts_per_tok: How many experts each token uses, at most; the number of active experts caps it. Default:
            all of them, as in every released checkpoint (upstream's default of 5 fits none of them).
        expert_names: One name per expert in checkpoint order; expert 0 is the public one. Default: ``public``,
            ``expert_1``, ...
        active_experts: The set in force, a subset of `expert_names`; None means all. Given at load time, only these
            experts are created and read.
        router_bias: Whether the router adds ``min(b, 0)`` with one learned scalar per expert and layer, fixed to 0 for
            the public expert (arXiv 2507.07024).
        router_projection: How the rows were made from text, if they were: ``encoder_width``, ``seed`` and ``encoder``
            of a `RouterProjection`. Experts with another one are refused when they are merged, and that is all.
        router_row_scale: The norm the rows started with, where they all had one and it is known.
        expert_forms: The form of each expert that is not a full copy of the dense network's: ``{"math": {"rank": 16}}``
            for a low-rank difference to expert 0, ``{"news": {"width": 512}}`` for a narrower network.

        shared_averaged: Whether the shared weights are an average over owners who trained them too: then leaving an
            expert out leaves what its data did to them, and opting out is not exact.

    Raises:
        ConfigurationError: If the settings contradict each other.
        FlexOlmoError: The kind of `flexolmo_hf.modeling.names` that fits, if a name is invalid, unknown or repeated.
    """

    # Experts are separate Linear layers here, so each one is split like a dense feed-forward network.
    base_model_tp_plan = {
        **{k: v for k, v in UpstreamFlexOlmoConfig.base_model_tp_plan.items() if ".mlp." not in k},
        "layers.*.mlp.experts.*.gate_proj": "colwise",
        "layers.*.mlp.experts.*.up_proj": "colwise",
        "layers.*.mlp.experts.*.down_proj": "rowwise",
    }
    # Whole experts on several processes: a style of `expert_parallel`.
    base_model_ep_plan = {"layers.*.mlp": "whole_experts"}

    num_experts_per_tok: int = 0
    expert_names: list[str] = field(default_factory=list)
    active_experts: list[str] | None = None
    router_bias: bool = False
    shared_averaged: bool = False
    router_projection: dict[str, Any] | None = None
    router_row_scale: float | None = None
    expert_forms: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill in the defaults that depend on other settings and check the names."""
        if self.num_experts_per_tok == 0:
            self.num_experts_per_tok = self.num_experts
        if not self.expert_names:
            self.expert_names = default_expert_names(self.num_experts)
        if len(self.expert_names) != self.num_experts:
            raise ConfigurationError(
                f"num_experts is {self.num_experts}, but there are {len(self.expert_names)} expert_names.",
                "Give one name per expert.",
            )
        if self.num_experts_per_tok < 1:
            raise ConfigurationError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, but each token needs an expert.",
                "Choose at least 1; the number of active experts caps it.",
            )
        for name in self.expert_names:
            check_expert_name(name)
        check_distinct(self.expert_names)
        if self.active_experts is not None:
            self.active_experts = parse_expert_set(self.active_experts, self.expert_names)
        self._check_forms()
        RouterProjection.read(self.router_projection)
        check_scale(self.router_row_scale)
        super().__post_init__(**kwargs)

    def _check_forms(self) -> None:
        for name, form in self.expert_forms.items():
            parse_expert_set([name], self.expert_names)
            check_expert_form(name, form, self.hidden_size, self.intermediate_size)
        first = self.expert_names[0]
        relative = [name for name, form in self.expert_forms.items() if "rank" in form]
        if PUBLIC in self.expert_forms or (relative and first in self.expert_forms):
            raise ConfigurationError(
                f"expert_forms gives {first!r}, the first expert, the form {self.expert_forms.get(first)}.",
                "The public expert is always full, and low-rank experts are differences to it: leave it out.",
            )

    @classmethod
    def get_config_dict(cls, path: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read ``config.json``, and the experts' names from the file beside it."""
        settings, rest = super().get_config_dict(path, **kwargs)
        return with_sidecar_names(settings, os.path.join(path, kwargs.get("subfolder", "")), cls.num_experts), rest

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Build the configuration from a dictionary and overrides, as `from_pretrained` does.

        Raises:
            NotFlexOlmoError: If the dictionary is the configuration of another architecture.
        """
        if config_dict.get("model_type", cls.model_type) != cls.model_type:
            raise NotFlexOlmoError(config_dict["model_type"])
        if "name_or_path" in kwargs:  # the Auto classes read the file with upstream's class
            config_dict = with_sidecar_names(config_dict, kwargs["name_or_path"], cls.num_experts)
        if kwargs.get("active_experts") is not None:
            # Upstream would assign the value after construction, past every check but the one of its type.
            config_dict = {**config_dict, "active_experts": kwargs.pop("active_experts")}
        known = config_dict.get("expert_names") or default_expert_names(config_dict.get("num_experts", cls.num_experts))
        if config_dict.get("active_experts") is not None:
            config_dict = {**config_dict, "active_experts": parse_expert_set(config_dict["active_experts"], known)}
        return super().from_dict(config_dict, **kwargs)

    def show(self, active: Iterable[str]) -> None:
        """Show the set that a model has put in force; models may share a configuration."""
        self.active_experts = list(active)
        self._shown_experts = tuple(self.active_experts)

    def shows_what_a_model_wrote(self) -> bool:
        """Tell whether `active_experts` is still what a model wrote there."""
        shown = self.active_experts
        return shown is not None and tuple(shown) == getattr(self, "_shown_experts", None)

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        d.pop("_shown_experts", None)
        super()._remove_keys_not_serialized(d)

    @property
    def loaded_indices(self) -> list[int]:
        """Checkpoint indices of the experts that a model built from this configuration holds.

        With a low-rank expert, expert 0 is among them even if it is not active: its matrices are part of the other's.
        """
        names = parse_expert_set(self.active_experts, self.expert_names)
        indices = {self.expert_names.index(name) for name in names}
        if any("rank" in self.expert_forms.get(name, {}) for name in names):
            indices.add(0)
        return sorted(indices)


def check_expert_form(name: str, form: Any, hidden: int, inner: int) -> None:
    """Refuse what is no form of an expert.

    Args:
        name: The expert, for the error.
        form: ``{"rank": r}`` with r from 1 to the smaller of both sizes, or ``{"width": w}`` with w below `inner`.
        hidden: The hidden size.
        inner: The width of a full expert.

    Raises:
        ConfigurationError: If it is anything else.
    """
    largest = {"rank": min(hidden, inner), "width": inner - 1}
    if isinstance(form, dict) and len(form) == 1:
        ((kind, size),) = form.items()
        if kind in largest and type(size) is int and 1 <= size <= largest[kind]:
            return
    raise ConfigurationError(
        f"The form of expert {name!r} is {form!r}.",
        f'It is {{"rank": 1 to {largest["rank"]}}} or {{"width": 1 to {largest["width"]}}}; a full expert has none.',
    )
