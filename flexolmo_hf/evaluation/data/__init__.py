"""Text to measure on: data packages, readers, splits, and the corpora made of them."""
