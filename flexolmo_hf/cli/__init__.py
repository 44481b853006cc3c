"""The command `flexolmo`: every subcommand calls one public function."""

# Each registers its subcommands, in help's order.
from flexolmo_hf.cli import (  # noqa: F401
    checkpoints,
    data,
    demo,
    evaluation,
    optout,
    planning,
    router,
    routing,
    routing_shares,
    training,
)
from flexolmo_hf.cli.application import app

__all__ = ["app"]
