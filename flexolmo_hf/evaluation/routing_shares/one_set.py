"""The one set of experts that shares are measured for."""

from typing import Any

from flexolmo_hf.errors import ExpertRowsError, NotFlexOlmoError
from flexolmo_hf.modeling.attribution import Attributable
from flexolmo_hf.modeling.selection import Selection


def one_set(model: Any, active_experts: Any) -> Selection:
    """Resolve what a caller gave as the set.

    Raises:
        NotFlexOlmoError: If the model has no experts.
        ExpertRowsError: If there is a set for each row.
        FlexOlmoError: As `forward` does for a set that is none of this model's.
    """
    if not isinstance(model, Attributable):
        raise NotFlexOlmoError(getattr(model.config, "model_type", None))
    selection = model.select_experts(active_experts)
    if len(selection.names) > 1:
        raise ExpertRowsError(f"{len(selection.names)} sets", "routing is measured for one set at a time")
    return selection
