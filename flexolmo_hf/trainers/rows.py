"""Whether a data set holds anything to train on, told before and after TRL has tokenised it."""

from typing import Any

from flexolmo_hf.errors import ConfigurationError


def refuse_unreadable(rows: Any, text_field: str) -> None:
    """Refuse rows without any column that `SFTTrainer` reads, and no rows.

    Args:
        rows: A data set, a dictionary of them, or None; of a stream whose columns are not known, nothing is said.
        text_field: The column of plain texts.

    Raises:
        ConfigurationError: If there is nothing to train on.
    """
    for part in rows.values() if isinstance(rows, dict) else [rows]:
        if part is None:
            continue
        if hasattr(part, "__len__") and len(part) == 0:
            raise ConfigurationError("The data set is empty.", "Give at least one row.")
        columns = getattr(part, "column_names", None)
        kinds = [{text_field}, {"prompt", "completion"}, {"messages"}, {"input_ids"}]
        if columns is not None and not any(kind <= set(columns) for kind in kinds):
            raise ConfigurationError(
                "The rows of the data hold nothing to train on.",
                f"Each needs {text_field!r}, 'prompt' and 'completion', or 'messages'.",
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
