"""The opt-out matrix on the terminal, as Markdown and as JSON."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from flexolmo_hf._folder import new_folder
from flexolmo_hf.evaluation.optout.clauses import Clause
from flexolmo_hf.evaluation.optout.figure import draw
from flexolmo_hf.evaluation.optout.matrix import ALL, Change, OptOutMatrix

_FORMAT = "flexolmo-opt-out/1"


def table(matrix: OptOutMatrix) -> Table:
    """Return a table for the terminal: bits per byte with all experts, and what each other set changes, in percent."""
    made = Table(
        title="Held-out bits per byte, and its change in percent",
        caption="Bold: data named after an expert that is left out. In parentheses: the 95 % interval holds 0.",
        title_justify="left",
        caption_justify="left",
    )
    made.add_column("experts", overflow="fold")
    for data in matrix.data:
        made.add_column(escape(data), justify="right", no_wrap=True)
    made.add_row(ALL, *(f"{matrix.bits(ALL, data):.3f}" for data in matrix.data), end_section=True)
    for label in matrix.sets:
        if label != ALL:
            made.add_row(label, *(_short(matrix, label, data) for data in matrix.data))
    return made


def markdown(matrix: OptOutMatrix, clauses: Sequence[Clause] = ()) -> str:
    """Return the report as a Markdown page.

    Args:
        matrix: The measurement.
        clauses: What a contract made of it.
    """
    rows = []
    for label, cells in _cells(matrix).items():
        shown = [
            f"**{cell}**" if matrix.is_own(label, data) else cell for data, cell in zip(matrix.data, cells, strict=True)
        ]
        rows.append(f"| {label} | " + " | ".join(shown) + " |")
    counts = [f"{data} {len(matrix.documents[ALL][data])}" for data in matrix.data]
    checked = ["", "## Contract", "", *(f"- {clause}" for clause in clauses)] if clauses else []
    keys = [f"- {label}: `{key}`" for label, key in matrix.keys.items()]
    return "\n".join(
        [
            "# What leaving experts out does",
            "",
            "First row: held-out bits per byte. Other rows: its change in percent, with the 95 % interval; above 0 is "
            "worse. Bold: the data named after an expert that is left out.",
            "",
            "| experts | " + " | ".join(data.replace("|", "\\|") for data in matrix.data) + " |",
            "|---" * (len(matrix.data) + 1) + "|",
            *rows,
            "",
            f"Documents: {', '.join(counts)}. Windows of {matrix.max_length} tokens.",
            *checked,
            *(["", "## What was measured", "", "The sets by their weights:", "", *keys] if keys else []),
            "",
        ]
    )


def as_dict(matrix: OptOutMatrix, clauses: Sequence[Clause] = ()) -> dict[str, Any]:
    """Return the report as plain dictionaries, ready for JSON; of documents, only how many there are.

    Args:
        matrix: The measurement.
        clauses: What a contract made of it.
    """
    return {
        "format": _FORMAT,
        "max_length": matrix.max_length,
        "data": {data: _size(matrix, data) for data in matrix.data},
        "sets": {
            label: {
                "experts": names,
                "fingerprint": matrix.keys.get(label),
                "data": {data: _figures(matrix, label, data) for data in matrix.data},
            }
            for label, names in matrix.sets.items()
        },
        "contract": [asdict(clause) for clause in clauses],
    }


def save(matrix: OptOutMatrix, folder: str | os.PathLike, clauses: Sequence[Clause] = ()) -> None:
    """Write ``opt_out.json``, ``opt_out.md`` and ``opt_out.png`` into a new folder.

    Args:
        matrix: The measurement.
        folder: New or empty.
        clauses: What a contract made of it.

    Raises:
        OutputFolderNotEmptyError, OutputPlaceError: If the folder is taken or cannot be one.
        MissingExtraError: If matplotlib is not installed.
    """
    with new_folder(folder) as place:
        # A broken model's figures may be infinite or no number, for which JSON has no word.
        said = json.dumps(_or_null(as_dict(matrix, clauses)), indent=1, ensure_ascii=False, allow_nan=False)
        (place / "opt_out.json").write_text(said + "\n", encoding="utf-8")
        (place / "opt_out.md").write_text(markdown(matrix, clauses), encoding="utf-8")
        draw(matrix, place / "opt_out.png")


def _cells(matrix: OptOutMatrix) -> dict[str, list[str]]:
    first = {ALL: [f"{matrix.bits(ALL, data):.3f}" for data in matrix.data]}
    rest = [label for label in matrix.sets if label != ALL]
    return first | {label: [_percent(matrix.change(label, data)) for data in matrix.data] for label in rest}


def _short(matrix: OptOutMatrix, label: str, data: str) -> str:
    change = matrix.change(label, data)
    cell = f"{change.value * 100:+.1f}" if change.is_clear else f"({change.value * 100:+.1f})"
    return f"[bold]{cell}[/bold]" if matrix.is_own(label, data) else cell


def _percent(change: Change) -> str:
    low, high = change.interval.low * 100, change.interval.high * 100
    return f"{change.value * 100:+.1f} % ({low:+.1f} to {high:+.1f})"


def _size(matrix: OptOutMatrix, data: str) -> dict[str, int]:
    bits = matrix.bits(ALL, data)
    return {"documents": len(matrix.documents[ALL][data]), "bytes": bits.bytes, "tokens": bits.tokens}


def _figures(matrix: OptOutMatrix, label: str, data: str) -> dict[str, Any]:
    change = matrix.change(label, data)
    return {
        "bits_per_byte": float(matrix.bits(label, data)),
        "interval": asdict(matrix.interval(label, data)),
        "change": change.value,
        "change_interval": asdict(change.interval),
        "own": matrix.is_own(label, data),
    }


def _or_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _or_null(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
