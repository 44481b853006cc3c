"""How fast one expert is trained and how much memory that takes, against stock transformers.

Run: python -m benchmarks.training [--rounds 5] [--smoke] [--output FOLDER]
"""
