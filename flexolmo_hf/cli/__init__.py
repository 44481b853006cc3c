"""The command `flexolmo`: every subcommand calls one public function."""

from flexolmo_hf.cli import checkpoints, demo, planning, training  # noqa: F401 (each registers its subcommands, in help's order)
from flexolmo_hf.cli.application import app

__all__ = ["app"]
