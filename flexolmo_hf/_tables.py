"""Tables for the terminal."""

from typing import Literal

from rich.console import Console
from rich.table import Table

from flexolmo_hf.composition.inspect import CheckpointSummary, ExpertSummary


def print_summary(summary: CheckpointSummary) -> None:
    """Print what a checkpoint or package holds as a table."""
    table = Table(title=summary.kind, title_justify="left")
    for column in ("expert", "index", "form", "parameters", "size", "file", "bias", "active"):
        justify: Literal["left", "right"] = "right" if column in ("index", "parameters", "size", "bias") else "left"
        # A file name is shown whole, on two lines if need be: it is what one looks for.
        table.add_column(column, justify=justify, overflow="fold")
    for expert in summary.experts:
        table.add_row(*_cells(expert))
    if summary.shared_parameters:
        size = _megabytes(summary.shared_bytes)
        table.add_row("(shared)", "", "", f"{summary.shared_parameters:,}", size, "", "", "")
    console = Console()
    console.print(table)
    if len(summary.experts) > 1:
        console.print(f"Each token uses {summary.experts_per_token} of {len(summary.experts)} experts.")
    if summary.anchor_digest:
        console.print(f"Anchor {summary.anchor_digest}")


def _cells(expert: ExpertSummary) -> list[str]:
    files = expert.files[0] if len(expert.files) == 1 else f"{len(expert.files)} files"
    return [
        expert.name,
        "-" if expert.index is None else str(expert.index),
        expert.form,
        f"{expert.parameters:,}",
        _megabytes(expert.bytes),
        files,
        "none" if expert.bias is None else f"{expert.bias:.3f}",
        "yes" if expert.active else "no",
    ]


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f} MB"
