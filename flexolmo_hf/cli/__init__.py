"""The command `flexolmo`: every subcommand calls one public function."""

# Each registers its subcommands, in help's order.
from flexolmo_hf.cli import checkpoints, demo, planning, router, routing, training  # noqa: F401
from flexolmo_hf.cli.application import app

__all__ = ["app"]
