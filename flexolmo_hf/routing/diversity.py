"""Choosing documents that are relevant and unlike each other: greedy MAP of a determinantal point process.

The set that is likely under such a process has a large determinant of its part of the kernel
``L_ij = q_i S_ij q_j``, with quality q and similarity S. Chen, Zhang and Zhou (arXiv 1709.05135, algorithm 1) find the
greedy choice without ever computing a determinant.

Shapes: M candidates, W width of the encoder.
"""

from collections.abc import Callable

import numpy as np

# Below this share of its kernel entry, what is left of a candidate is rounding.
_NOTHING_LEFT = 1e-10


def pick_diverse(
    relevance_M: np.ndarray, unit_MW: np.ndarray, n: int, *, weight: float = 5.0, reach: float = 0.25
) -> list[int]:
    """Pick documents greedily, each time the one that adds most to relevance and difference together.

    Quality is ``exp(weight * relevance / 2)``, so that a choice is worth ``weight`` times its summed relevance plus the
    log-determinant of its similarities. Similarity is ``exp((cosine - 1) / reach)``: the plain cosine has a
    determinant of 0 for any choice of more documents than the encoder is wide.

    Args:
        relevance_M: The classifier's probabilities.
        unit_MW: Embeddings of length 1.
        n: How many to pick, at most M. Takes ``n * M`` float64 of memory.
        weight: How much relevance counts. 0 looks at difference alone.
        reach: How much the cosine has to fall for two documents to count as different.

    Returns:
        Positions in the order of choice.
    """
    quality_M = np.exp(0.5 * weight * relevance_M.astype(np.float64))
    unit_MW = unit_MW.astype(np.float64)

    def kernel_row(position: int) -> np.ndarray:
        similarity_M = np.exp((unit_MW @ unit_MW[position] - 1.0) / reach)
        return quality_M[position] * similarity_M * quality_M

    picked = greedy_map(quality_M**2, kernel_row, n)
    # Documents whose embeddings coincide add nothing, and come last, the most relevant of them first.
    left = np.setdiff1d(np.arange(len(quality_M)), picked)
    return [*picked, *left[np.argsort(-relevance_M[left], kind="stable")].tolist()][:n]


def greedy_map(diagonal_M: np.ndarray, kernel_row: Callable[[int], np.ndarray], n: int) -> list[int]:
    """Find, one by one, the positions whose part of a kernel has the largest determinant.

    Args:
        diagonal_M: The kernel's diagonal.
        kernel_row: Gives one row ``(M,)`` of the kernel; it is asked once for each position chosen.
        n: How many to find.

    Returns:
        At most `n` positions in the order of choice; fewer where the kernel's rank allows no more.
    """
    gain_M = diagonal_M.astype(np.float64).copy()
    floor_M = gain_M * _NOTHING_LEFT
    factor_nM = np.zeros((min(n, len(gain_M)), len(gain_M)))
    picked: list[int] = []
    while len(picked) < len(factor_nM):
        # What the candidate multiplies the determinant by; the first of equals is taken.
        position = int(np.argmax(gain_M))
        if gain_M[position] <= floor_M[position]:
            break
        step = len(picked)
        row_M = kernel_row(position) - factor_nM[:step, position] @ factor_nM[:step]
        factor_nM[step] = row_M / np.sqrt(gain_M[position])
        gain_M -= factor_nM[step] ** 2
        gain_M[gain_M <= floor_M] = -np.inf
        gain_M[position] = -np.inf
        picked.append(position)
    return picked
