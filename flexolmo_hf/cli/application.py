"""What every subcommand shares: the application, and how our own errors are shown."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import typer

# Nothing is reported unless the user asks for it; the libraries read this when they are imported, which is later.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

app = typer.Typer(
    help="FlexOlmo for Hugging Face Transformers: make, train, pack, merge and inspect experts.",
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
    add_completion=False,
)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Show our own errors as one sentence; anything else is a fault and keeps its traceback."""
    from flexolmo_hf.errors import FlexOlmoError

    try:
        yield
    except FlexOlmoError as error:
        typer.secho(f"Error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(2) from None
