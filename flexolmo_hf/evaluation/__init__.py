"""Measuring models: held-out bits per byte."""

from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte, bits_by_document, bits_per_byte

__all__ = ["BitsPerByte", "bits_by_document", "bits_per_byte"]
