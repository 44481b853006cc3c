"""Matrices made by hand, so that every number is known."""

from flexolmo_hf.evaluation.bits_per_byte import BitsPerByte
from flexolmo_hf.evaluation.optout.matrix import OptOutMatrix, opt_out_sets

# Percent by which each of ten documents changes, by the expert that is left out and the data.
CHANGES = {
    "without public": {"public": 40, "math": 20, "code": 25},
    "without math": {"public": -0.2, "math": 12, "code": 0.4},
    "without code": {"public": 0.1, "math": 0.3, "code": 9},
}


def made(changes=CHANGES, spread=0.0):
    """Make a matrix in which all documents need 2 bits per byte with all experts.

    Args:
        changes: Percent by row and data.
        spread: Percent by which every other document changes more, and the rest less.
    """
    sets = opt_out_sets(["public", "math", "code"])
    documents = {}
    for label in sets:
        row = changes.get(label, {"public": 0, "math": 0, "code": 0})
        documents[label] = {data: documents_of(percent, spread) for data, percent in row.items()}
    return OptOutMatrix(sets, documents, max_length=64, keys={label: f"key of {label}" for label in sets})


def documents_of(percent, spread):
    signs = [1, -1] * 5
    return [BitsPerByte(200 * (1 + (percent + sign * spread * bool(percent)) / 100), 100, 30) for sign in signs]
