"""Run the command as a module: ``python -m flexolmo_hf.cli``."""

from flexolmo_hf.cli import app

app()
