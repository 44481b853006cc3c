"""Whether a data set holds anything to train on, told before and after TRL has tokenised it."""

from collections.abc import Sequence
from typing import Any

from flexolmo_hf.errors import ConfigurationError


def text_columns(text_field: str) -> list[tuple[str, ...]]:
    """Return the kinds of rows that `SFTTrainer` reads, by the columns each kind has."""
    return [(text_field,), ("prompt", "completion"), ("messages",), ("input_ids",)]


def refuse_lacking(rows: Any, kinds: Sequence[tuple[str, ...]]) -> None:
    """Refuse rows that are of none of the kinds a trainer reads, and no rows.

    Args:
        rows: A data set, a dictionary of them, or None; of a stream whose columns are not known, nothing is said.
        kinds: The columns of each kind; none, if the trainer has another way to read rows.

    Raises:
        ConfigurationError: If there is nothing to train on.
    """
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        if part is None:
            continue
        if hasattr(part, "__len__") and len(part) == 0:
            raise ConfigurationError("The data set is empty.", "Give at least one row.")
        columns = getattr(part, "column_names", None)
        if columns is not None and kinds and not any(set(kind) <= set(columns) for kind in kinds):
            raise ConfigurationError(
                "The rows of the data hold nothing to train on.",
                f"Each needs {', or '.join(' and '.join(map(repr, kind)) for kind in kinds)}.",
            )


def refuse_too_short(tokenised: Any) -> None:
    """Refuse rows of which none has a second token to predict.

    Args:
        tokenised: A data set with ``input_ids``; others pass.

    Raises:
        ConfigurationError: If no row is long enough.
    """
    if not hasattr(tokenised, "__len__") or "input_ids" not in (getattr(tokenised, "column_names", None) or []):
        return
    if not any(len(row["input_ids"]) > 1 for row in tokenised):
        raise ConfigurationError(
            f"None of the {len(tokenised)} rows is longer than one token, so there is nothing to predict.",
            "Give longer texts, or a larger max_length.",
        )


def refuse_all_dropped(prepared: Any, max_length: int | None) -> None:
    """Refuse pairs of which none is left: those whose prompt leaves no room for an answer are dropped.

    Args:
        prepared: The data set as `DPOTrainer` has prepared it; of a stream, nothing is said.
        max_length: Tokens per sequence, prompt and answer together.

    Raises:
        ConfigurationError: If no pair is left.
    """
    if hasattr(prepared, "__len__") and len(prepared) == 0:
        raise ConfigurationError(
            f"Every prompt has max_length={max_length} tokens or more, so no pair of answers is left to compare.",
            "Set a larger max_length, or give shorter prompts.",
        )
