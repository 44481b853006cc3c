"""Upcycling: a dense OLMo-2 model becomes the anchor of a FlexOlmo model (arXiv 2507.07024).

Shape letters: H hidden, L layers.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, Olmo2Config, Olmo2ForCausalLM, PreTrainedModel

from flexolmo_hf.errors import ConfigurationError, NotOlmo2Error, UnknownExpertError
from flexolmo_hf.modeling.configuration import FlexOlmoConfig
from flexolmo_hf.modeling.embedded_row import EmbeddedRow, common_projection, rescaled
from flexolmo_hf.modeling.files.checkpoint import refuse_gaps
from flexolmo_hf.modeling.files.locate import model_type_of, named_errors
from flexolmo_hf.modeling.names import PUBLIC, check_distinct, check_expert_name

#: Where a new expert's bias starts. Training on the expert's own domain only ever pushes the bias up, so it acts
#: through a negative start; with equal rows, -1 gives the new expert 27 % of the routing mass beside the public one
#: instead of 50 %.
BIAS_START = -1.0

_DENSE_FFN = re.compile(r"(?P<layer>.*layers\.\d+)\.mlp\.(?P<matrix>(?:gate|up|down)_proj\.weight)")


def upcycle(
    dense: Any,
    *,
    model_class: Any,
    expert: str | None = None,
    router_embeddings: Mapping[str, Any] | None = None,
    router_row_scale: float | None = None,
    router_bias: bool = False,
    bias_start: float | None = None,
    **load_options: Any,
) -> Any:
    """Make a FlexOlmo model from a dense OLMo-2 model, with or without a new expert to be trained.

    The public expert, and the new one where asked for, are copies of the dense feed-forward network; everything else is
    carried over. Since both experts are equal and routing weights sum to 1, the result computes what the dense model
    does.

    Args:
        dense: A folder or Hub repository of an OLMo-2 checkpoint, or an `Olmo2ForCausalLM`, whose weights are copied.
        model_class: The class to make, normally `FlexOlmoForCausalLM`.
        expert: Name of a new expert; None makes a model with the public expert alone.
        router_embeddings: Router rows by expert name, each ``(H,)`` for all layers or ``(L, H)``: arrays, or what
            `domain_embedding` returns, whose projection the configuration then remembers. An expert without one starts
            at zero, the neutral row: it takes an equal share of every token.
        router_row_scale: The norm that every given row is brought to; None leaves them as they are.
        router_bias: Whether the router has biases.
        bias_start: Where the new expert's bias starts, at most 0; default `BIAS_START`.
        **load_options: For a path: as `Olmo2ForCausalLM.from_pretrained` (``dtype``, ``revision``, ...).

    Returns:
        The model in evaluation mode, with experts ``["public"]`` or ``["public", expert]``.

    Raises:
        NotOlmo2Error: If the dense model is of another architecture.
        CheckpointNotFoundError, DamagedFileError, IncompleteCheckpointError: If its files are not there or not whole.
        InvalidExpertNameError: If `expert` cannot be a name.
        DuplicateExpertError: If `expert` is called like the public one.
        UnknownExpertError: If a router embedding belongs to neither expert.
        ConfigurationError: If an embedding has another width, is not finite, or is zero and shall be scaled; or if
            `bias_start` is above 0, not finite, or given where there is no bias to start.
        RouterProjectionError: If two embeddings come from different projections.
    """
    names = [PUBLIC] if expert is None else [PUBLIC, check_expert_name(expert)]
    check_distinct(names)
    embeddings = router_embeddings or {}
    rows = _checked_rows(embeddings, names)
    if router_row_scale is not None:
        rows = {name: rescaled(row.float(), router_row_scale) for name, row in rows.items()}
    if bias_start is not None and (expert is None or not router_bias):
        raise ConfigurationError(
            f"bias_start is {bias_start}, but no new expert with a router bias is made.",
            "Give expert=NAME and router_bias=True, or leave bias_start out.",
        )
    start = BIAS_START if bias_start is None else checked_bias_start(bias_start)
    model = _dense_model(dense, load_options)
    given = model is dense
    config = anchor_config(model.config, expert_names=names, router_bias=router_bias)
    _remember_origin(config, embeddings, router_row_scale)
    state = _mixture_state(model, config, rows, bias_start=start, copy_anchor=given)
    config.dtype = model.dtype
    made = model_class.from_pretrained(None, config=config, state_dict=state, dtype=model.dtype)
    made.generation_config = model.generation_config
    return made


def anchor_config(dense_config: Any, *, expert_names: list[str], router_bias: bool = False) -> FlexOlmoConfig:
    """Carry the settings of a dense OLMo-2 model over, its RoPE and epsilon included: upstream's defaults differ.

    Raises:
        NotOlmo2Error: If the configuration is of another architecture.
    """
    if not isinstance(dense_config, Olmo2Config) or dense_config.model_type != Olmo2Config.model_type:
        raise NotOlmo2Error(getattr(dense_config, "model_type", None))
    settings = dense_config.to_dict()
    for key in ("model_type", "architectures", "transformers_version", "_name_or_path"):
        settings.pop(key, None)
    return FlexOlmoConfig(**settings, num_experts=len(expert_names), expert_names=expert_names, router_bias=router_bias)


def _dense_model(dense: Any, load_options: Mapping[str, Any]) -> Olmo2ForCausalLM:
    if isinstance(dense, PreTrainedModel):
        if load_options:
            raise ConfigurationError(
                f"{sorted(load_options)} are options for loading, but the dense model is already loaded.",
                "Leave them out or give a path.",
            )
        if not isinstance(dense, Olmo2ForCausalLM) or dense.config.model_type != Olmo2Config.model_type:
            raise NotOlmo2Error(dense.config.model_type)
        return dense
    subfolder = load_options.get("subfolder", "")
    found = model_type_of(dense, subfolder)
    if found is not None and found != Olmo2Config.model_type:
        raise NotOlmo2Error(found)
    locate = {key: load_options[key] for key in ("revision", "subfolder", "token", "cache_dir") if key in load_options}
    with named_errors(dense, subfolder):
        config = AutoConfig.from_pretrained(dense, **locate)
        if config.model_type != Olmo2Config.model_type:
            raise NotOlmo2Error(config.model_type)
        model, report = Olmo2ForCausalLM.from_pretrained(
            dense, use_safetensors=True, output_loading_info=True, **load_options
        )
    refuse_gaps(report)
    return model


def _remember_origin(config: FlexOlmoConfig, embeddings: Mapping[str, Any], scale: float | None) -> None:
    embedded = {name: row for name, row in embeddings.items() if isinstance(row, EmbeddedRow)}
    projection = common_projection({name: row.projection for name, row in embedded.items()})
    config.router_projection = None if projection is None else projection.record()
    scales = {embedded[name].scale if name in embedded else None for name in embeddings}
    if scale is None and len(scales) == 1:
        scale = scales.pop()
    config.router_row_scale = None if scale is None else float(scale)


def _checked_rows(embeddings: Mapping[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
    for name in embeddings:
        if name not in names:
            raise UnknownExpertError(name, names)
    rows = {
        name: torch.as_tensor(row.vector if isinstance(row, EmbeddedRow) else row) for name, row in embeddings.items()
    }
    for name, row in rows.items():
        check_finite(row, name)
    return rows


def _mixture_state(
    dense: Olmo2ForCausalLM,
    config: FlexOlmoConfig,
    rows: Mapping[str, torch.Tensor],
    *,
    bias_start: float,
    copy_anchor: bool,
) -> dict[str, Any]:
    state = {}
    for key, tensor in dense.state_dict().items():
        # A caller's model keeps its weights to itself; one that was loaded here hands them over.
        anchors = tensor.clone() if copy_anchor else tensor
        match = _DENSE_FFN.fullmatch(key)
        if match is None:
            state[key] = anchors
            continue
        for index in range(config.num_experts):
            name = f"{match['layer']}.mlp.experts.{index}.{match['matrix']}"
            state[name] = anchors if index == 0 else tensor.clone()
    for layer in range(config.num_hidden_layers):
        gate = f"model.layers.{layer}.mlp.gate"
        rows_EH = torch.stack([router_row(rows.get(name), layer, config) for name in config.expert_names])
        state[f"{gate}.weight"] = rows_EH.to(dense.dtype)
        if config.router_bias:
            start = [0.0 if name == PUBLIC else bias_start for name in config.expert_names]
            state[f"{gate}.bias"] = torch.tensor(start, dtype=dense.dtype)
    return state


def checked_bias_start(value: float) -> float:
    """Return where a bias starts, if it can start there.

    Raises:
        ConfigurationError: If it is above 0 or not finite: the router adds ``min(b, 0)``.
    """
    if not -math.inf < value <= 0:
        raise ConfigurationError(
            f"bias_start is {value}, but a bias is finite and at most 0: above, it has no effect and no gradient.",
            f"Choose 0 or less; the default is {BIAS_START}.",
        )
    return float(value)


def check_finite(row: torch.Tensor, name: str) -> None:
    """Refuse the router row of an expert that holds NaN or infinity.

    Raises:
        ConfigurationError: If it does.
    """
    if not torch.isfinite(row).all():
        raise ConfigurationError(
            f"The router embedding of {name!r} holds NaN or infinite values.", "Compute it again without them."
        )


def router_row(rows: torch.Tensor | None, layer: int, config: FlexOlmoConfig) -> torch.Tensor:
    """Return the router row ``(H,)`` of an expert in one layer, float32.

    Args:
        rows: ``(H,)`` for all layers or ``(L, H)``; None for the neutral row, which is zero.
        layer: Which layer.
        config: The model's configuration.

    Raises:
        ConfigurationError: If it has another shape.
    """
    if rows is None:
        return torch.zeros(config.hidden_size)
    allowed = [(config.hidden_size,), (config.num_hidden_layers, config.hidden_size)]
    if tuple(rows.shape) not in allowed:
        raise ConfigurationError(
            f"A router embedding has shape {tuple(rows.shape)}, but the model needs {allowed[0]} or {allowed[1]}.",
            "Project it to the hidden size first.",
        )
    return (rows if rows.dim() == 1 else rows[layer]).float()
