"""The orthonormal projection from an encoder's width to the hidden size: the same numbers for everybody with a seed.

Shape letters: W width of the encoder, H hidden.
"""

import torch


def orthonormal_projection(width: int, hidden_size: int, *, seed: int) -> torch.Tensor:
    """Make the matrix that takes embeddings to the hidden size.

    It is the Q of the QR decomposition of a Gaussian matrix, drawn and computed in float64 on the CPU, whatever device
    or dtype the model has. A QR decomposition is unique once the signs of R's diagonal are fixed, so implementations
    agree up to rounding. Towards a larger size nothing is lost: norms and angles stay. Towards a smaller one, a random
    subspace keeps angles approximately.

    Args:
        width: The encoder's width.
        hidden_size: The model's.
        seed: Of the Gaussian matrix.

    Returns:
        ``(W, H)``, float64; its rows are orthonormal if H is larger, else its columns.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    tall = (max(width, hidden_size), min(width, hidden_size))
    gaussian = torch.randn(tall, generator=generator, dtype=torch.float64, device="cpu")
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()
    return q if width >= hidden_size else q.T
