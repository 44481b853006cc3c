"""How a mixture divides its work: the experts' shares by domain, layer and position, as figures, tables and pages."""

from flexolmo_hf.evaluation.routing_shares.result import RoutingShares
from flexolmo_hf.evaluation.routing_shares.shares import routing_shares

__all__ = ["RoutingShares", "routing_shares"]
