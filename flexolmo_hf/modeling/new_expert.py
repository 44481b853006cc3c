"""A new expert in an existing mixture: a copy of one that is there, to be trained beside the others.

Shape letters: H hidden, L layers.
"""

from typing import Any

import torch

from flexolmo_hf.modeling.embedded_row import EmbeddedRow, RouterProjection, common_projection
from flexolmo_hf.modeling.live import LayerParts, LiveExperts
from flexolmo_hf.modeling.low_rank import tensor_shapes
from flexolmo_hf.modeling.names import check_distinct, check_expert_name
from flexolmo_hf.modeling.upcycling import BIAS_START, check_finite, checked_bias_start, router_row


def insert_copy(model: LiveExperts, name: str, like: str, row: Any, bias_start: float | None) -> None:
    """Insert a copy of an expert, with a router row and a bias of its own; see `LiveExperts.new_expert`."""
    config = model.config
    check_distinct([*config.expert_names, check_expert_name(name)])
    model.expert_position(like)
    model._refuse_special_weights()
    embedded = row if isinstance(row, EmbeddedRow) else None
    rows = None if row is None else torch.as_tensor(row if embedded is None else embedded.vector)
    if rows is not None:
        check_finite(rows, name)
    if bias_start is None and config.router_bias:
        bias_start = BIAS_START
    bias = None if bias_start is None else torch.tensor([checked_bias_start(bias_start)])
    form = config.expert_forms.get(like)
    tensors = tensor_shapes(config.hidden_size, config.intermediate_size, form)
    parts = []
    for layer, source in enumerate(model.expert_modules(like)):
        matrices = {key: source.get_parameter(key).detach().clone() for key in tensors}
        parts.append(LayerParts(matrices, router_row(rows, layer, config), bias))
    if embedded is not None:
        known = {"the model": RouterProjection.read(config.router_projection), name: embedded.projection}
        projection = common_projection(known)
        config.router_projection = None if projection is None else projection.record()
    model.insert_expert(name, parts, form)
