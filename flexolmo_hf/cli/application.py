"""What every subcommand shares: the application, and how our own errors are shown."""

import os
import re
from collections.abc import Iterator, Sequence
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


def named_files(option: str, items: Sequence[str], kind: str = "FILE") -> dict[str, str]:
    """Read NAME=FILE as an option that may be repeated gives it.

    Raises:
        ConfigurationError: If one has no ``=``, no name or nothing behind it, or a name comes twice.
    """
    from flexolmo_hf.errors import ConfigurationError

    found: dict[str, str] = {}
    for item in items:
        name, separator, place = item.partition("=")
        if not (separator and name and place):
            lack = "has no '='" if not separator else "has the name ''" if not name else "has nothing behind '='"
            raise ConfigurationError(f"--{option} {item!r} {lack}.", f"Write --{option} NAME={kind}.")
        if name in found:
            raise ConfigurationError(
                f"The name {name!r} appears twice among --{option}.", f"Write --{option} {name}={kind} once."
            )
        found[name] = place
    return found


def names_of(joined: str | None) -> list[str] | None:
    """Read experts as one option gives them, ``public+math`` or ``public,math``; None stays."""
    return None if joined is None else re.split("[+,]", joined)
