"""Where an owner starts: a model with one more expert, made from a dense model or from a mixture."""

import os
from collections.abc import Mapping
from typing import Any

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.files.locate import looks_like_a_repository, model_type_of
from flexolmo_hf.modeling.model import FlexOlmoForCausalLM
from flexolmo_hf.modeling.upcycling import BIAS_START


def starting_model(
    path: str | os.PathLike,
    *,
    expert: str | None = None,
    router_bias: bool = False,
    bias_start: float | None = None,
    rows: Mapping[str, Any] | None = None,
) -> FlexOlmoForCausalLM:
    """Load a model and give it a new expert to be trained.

    Args:
        path: A dense OLMo-2 checkpoint, or, with `expert`, a FlexOlmo one, beside whose experts it will be trained.
        expert: Name of the new expert; None makes a model of a dense one with the public expert alone.
        router_bias: Whether the router has biases; one that has them keeps them.
        bias_start: Where the new expert's bias starts; default `BIAS_START`.
        rows: Router rows by expert, as `domain_embedding` or `load_embedding` return them; default the neutral row.

    Raises:
        FlexOlmoError: The kind that fits, as `FlexOlmoForCausalLM.from_dense` and `new_expert`.
    """
    rows = rows or {}
    options: dict[str, Any] = {"expert": expert, "router_bias": router_bias, "bias_start": bias_start}
    if expert is None or looks_like_a_repository(path) or model_type_of(path) != FlexOlmoConfig.model_type:
        return FlexOlmoForCausalLM.from_dense(path, router_embeddings=rows, **options)
    if others := sorted(rows.keys() - {expert}):
        raise ConfigurationError(
            f"Rows are given for {others}, but a mixture's experts keep theirs.", f"Give a row for {expert!r} alone."
        )
    model = FlexOlmoForCausalLM.from_pretrained(path, active_experts=None)
    if bias_start is not None and not (router_bias or model.config.router_bias):
        raise ConfigurationError(
            f"bias_start is {bias_start}, but the router has no biases.",
            "Give it some with router_bias=True (--router-bias), or leave bias_start out.",
        )
    if router_bias and bias_start is None:
        bias_start = BIAS_START
    model.new_expert(expert, row=rows.get(expert), bias_start=bias_start)
    return model
