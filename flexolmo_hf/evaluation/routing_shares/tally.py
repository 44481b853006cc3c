"""Sums over the tokens of one domain, from which its shares follow: no token is kept.

Shape letters: B rows, T tokens, N counted tokens, L layers, E experts, P buckets of positions.
"""

import math

import torch

from flexolmo_hf.errors import NonFiniteTensorError


def buckets(max_length: int) -> list[tuple[int, int]]:
    """Return buckets of positions in a window of some length: 1, 2, 3 to 4, 5 to 8 and so on, both ends included.

    Routing settles within the first tokens of a window, so buckets grow with the position.
    """
    last = max_length - 1
    ends = [2**power for power in range(math.ceil(math.log2(last)) + 1)]
    return [(end // 2 + 1, min(end, last)) for end in ends]


class Tally:
    """Sums of one domain, in float64 on the CPU.

    Attributes:
        tokens: Tokens counted, by bucket of positions, ``(P,)``.
        weight: Each expert's part of the routing mass, ``(P, L, E)``.
        top1: Tokens whose strongest expert it is, ``(L, E)``. Experts with equal weights share the token.
        picks: Tokens that have it among their `top_k` strongest, ``(L, E)``. Experts with equal weights share the
            places left to them.
        entropy: Entropy of the tokens' weights in bits, ``(L,)``.
        agreement: Tokens whose strongest expert is the same in two layers, ``(L, L)``.
    """

    def __init__(self, domain: str, *, layers: int, experts: int, top_k: int, max_length: int):
        self.domain, self.top_k = domain, top_k
        self.ends = torch.tensor([end for _, end in buckets(max_length)])
        places = len(self.ends)
        self.tokens = torch.zeros(places, dtype=torch.float64)
        self.weight = torch.zeros(places, layers, experts, dtype=torch.float64)
        self.top1 = torch.zeros(layers, experts, dtype=torch.float64)
        self.picks = torch.zeros(layers, experts, dtype=torch.float64)
        self.entropy = torch.zeros(layers, dtype=torch.float64)
        self.agreement = torch.zeros(layers, layers, dtype=torch.float64)

    def add(self, weights_BTLE: torch.Tensor, position_BT: torch.Tensor) -> None:
        """Add a batch.

        Args:
            weights_BTLE: What the mixtures multiplied the experts' outputs by.
            position_BT: Position of each token in its window, from 1; 0 for what is not counted.

        Raises:
            NonFiniteTensorError: If a counted token has a weight that is no number.
        """
        counted_BT = position_BT > 0
        # Chosen, not multiplied by the mask: what is not counted may be NaN.
        weights_NLE = weights_BTLE[counted_BT].double()
        mass_NLE = weights_NLE / weights_NLE.sum(dim=-1, keepdim=True)
        if not mass_NLE.isfinite().all():
            raise NonFiniteTensorError("routing weights", f"domain {self.domain!r}")
        places_N = torch.bucketize(position_BT[counted_BT], self.ends)
        inside_PN = torch.nn.functional.one_hot(places_N, len(self.ends)).T.double()
        self.tokens += inside_PN.sum(dim=1)
        self.weight += (inside_PN @ mass_NLE.flatten(1)).view_as(self.weight)
        top1_NLE = picked(mass_NLE, 1)
        self.top1 += top1_NLE.sum(dim=0)
        self.picks += (top1_NLE if self.top_k == 1 else picked(mass_NLE, self.top_k)).sum(dim=0)
        self.entropy += torch.special.entr(mass_NLE).sum(dim=(0, 2)) / math.log(2)
        by_layer = top1_NLE.transpose(0, 1).flatten(1)
        self.agreement += by_layer @ by_layer.T


def picked(weights_NLE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Tell which experts are among each token's strongest, ``(N, L, E)``; each token's sum is `top_k`.

    Experts with equal weights share the places left to them, so that two copies of one expert count alike and no
    order of the experts decides.
    """
    if top_k == weights_NLE.shape[-1]:
        return torch.ones_like(weights_NLE)
    last = weights_NLE.amax(-1, keepdim=True) if top_k == 1 else weights_NLE.topk(top_k, dim=-1).values[..., -1:]
    above, level = weights_NLE > last, weights_NLE == last
    left = top_k - above.sum(dim=-1, keepdim=True)
    return above + level * (left / level.sum(dim=-1, keepdim=True).double())
