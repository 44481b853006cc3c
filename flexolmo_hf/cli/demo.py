"""The subcommand that shows it all."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo_hf.cli.application import app, plain_errors


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes; new or empty.")] = Path(
        "demo_output"
    ),
    quick: Annotated[bool, typer.Option(help="A much smaller run, to see that everything works.")] = False,
    cache: Annotated[Path | None, typer.Option(help="Where the two packages with public texts are kept.")] = None,
) -> None:
    """See the whole idea on real text: a public model, two experts trained alone, merged, and switched on and off."""
    with plain_errors():
        from flexolmo_hf._extras import require

        require("train", "trl", "datasets")
        from flexolmo_hf.demo.pipeline import run_demo

        run_demo(output, quick=quick, cache_dir=cache)
