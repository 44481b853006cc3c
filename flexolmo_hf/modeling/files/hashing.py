"""Hashes of tensors: whether two of them are the same, bit for bit, told without either."""

import hashlib

import torch

# Values.
_PIECE = 2**24


def hash_tensor(tensor: torch.Tensor) -> str:
    """Return the sha256 of a tensor's dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    flat = tensor.detach().contiguous().reshape(-1)
    # Through the host in pieces: a copy of a whole tensor could be a gigabyte.
    for piece in flat.split(_PIECE):
        digest.update(piece.cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
