"""Which parameters move: training one expert alone."""
