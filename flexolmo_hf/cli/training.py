"""Subcommands that train."""

from pathlib import Path
from typing import Annotated

import typer

from flexolmo_hf.cli.application import app, plain_errors


@app.command()
def train(
    config: Annotated[
        Path, typer.Option(help="YAML file: model_path, data, eval_data and any field of ExpertSFTConfig.")
    ],
) -> None:
    """Train one expert alone, next to the frozen public model."""
    with plain_errors():
        from flexolmo_hf._extras import require

        require("train", "trl", "datasets")
        from flexolmo_hf.trainers.job import read_job, run_job

        inputs, settings = read_job(config)
        output = run_job(inputs, settings)
    # Of several processes one speaks.
    if settings.should_save:
        typer.echo(f"Wrote {output}.")
