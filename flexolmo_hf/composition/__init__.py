"""How a model is made of parts: expert packages, fingerprints, merging, inspecting, cards."""
