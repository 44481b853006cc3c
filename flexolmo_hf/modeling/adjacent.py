"""One tensor over two that lie side by side in memory, as an expert's gate and up projections do in a mapped file.

A single product reads both faster than two products do, and nothing is copied.
"""

import ctypes
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Adjacent:
    """Two matrices of the same width and the one they form.

    Attributes:
        both: ``(R1 + R2, W)``, on the memory of the two.
        addresses: Where the two were found; whoever sets ``.data`` moves them away.
        storages: What keeps that memory.
    """

    both: torch.Tensor
    addresses: tuple[int, int]
    storages: tuple[torch.UntypedStorage, torch.UntypedStorage]

    def holds(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        """Tell whether the two still are where they were found."""
        return self.addresses == (first.data_ptr(), second.data_ptr())


def join_adjacent(first: torch.Tensor, second: torch.Tensor) -> Adjacent | None:
    """Return one tensor over two matrices, or None if the second does not begin where the first ends.

    Args:
        first: ``(R1, W)`` on a CPU.
        second: ``(R2, W)`` on a CPU.
    """
    addresses = (first.data_ptr(), second.data_ptr())
    if (
        first.dtype != second.dtype
        or first.shape[1:] != second.shape[1:]
        or not (first.is_contiguous() and second.is_contiguous())
        or first.numel() == 0
        or addresses[0] + first.nbytes != addresses[1]
    ):
        return None
    # A file that is mapped tensor by tensor gives each a storage of its own, and a view cannot leave its storage.
    memory = (ctypes.c_byte * (first.nbytes + second.nbytes)).from_address(addresses[0])
    both = torch.frombuffer(memory, dtype=first.dtype).view(-1, first.shape[1])
    return Adjacent(both, addresses, (first.untyped_storage(), second.untyped_storage()))
