"""The mini study: FlexOlmo, its ablations and every baseline on FlexMix-mini, on a CPU."""
