"""What leaving experts out does: the opt-out matrix, its picture, its report, and contracts on it."""

from flexolmo_hf.evaluation.optout.contract import Contract, Terms
from flexolmo_hf.evaluation.optout.matrix import ALL, Change, OptOutMatrix, opt_out_matrix

__all__ = ["ALL", "Change", "Contract", "OptOutMatrix", "Terms", "opt_out_matrix"]
