"""How fast a model with named experts runs and how much memory it takes, against stock transformers.

Run: python -m benchmarks.inference [--rounds 15] [--quick] [--output FOLDER]
"""
