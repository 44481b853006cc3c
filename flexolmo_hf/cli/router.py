"""The subcommand for tuned routers."""

from pathlib import Path
from typing import Annotated, Any

import typer

from flexolmo_hf.cli.application import app, plain_errors


@app.command()
def router(
    checkpoint: Annotated[str, typer.Argument(help="A FlexOlmo checkpoint: folder or Hub repository.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="With --rollback: folder for the checkpoint; new or empty.", show_default=False),
    ] = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Write it with its router as it was before tuning.")
    ] = False,
    owner: Annotated[
        str | None, typer.Option(help="With --rollback: only if proxies for this expert were used.", show_default=False)
    ] = None,
) -> None:
    """Show what tuning did to a router, or take it back: all rows, since each depends on all owners' proxies."""
    with plain_errors():
        from flexolmo_hf import describe_router, rollback_router
        from flexolmo_hf.errors import ConfigurationError

        if rollback != (out is not None):
            raise ConfigurationError(
                "An output folder and --rollback go together.", "Give both to roll back, or neither to look."
            )
        if owner is not None and not rollback:
            raise ConfigurationError("--owner says nothing without --rollback.", "Give --rollback and OUT too.")
        if out is None:
            _show(describe_router(checkpoint))
            return
        rollback_router(checkpoint, out, owner=owner)
    typer.echo(f"Wrote {out}: all router rows are those of before tuning.")


def _show(summary: Any) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="router", title_justify="left")
    table.add_column("expert")
    for column in ("cosine to base", "bias", "base bias"):
        table.add_column(column, justify="right")
    table.add_column("proxies used")
    for expert in summary.experts:
        figures = [_figure(value) for value in (expert.cosine, expert.bias, expert.base_bias)]
        table.add_row(expert.name, *figures, "yes" if expert.proxies else "no")
    console = Console()
    console.print(table)
    if not summary.tuned:
        console.print("This router was never tuned, or its former rows were not kept.")
        return
    owners = ", ".join(summary.proxies) or "nobody"
    console.print(f"Tuned for {summary.steps:,} steps on {summary.tokens:,} tokens, with proxies for {owners}.")


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
