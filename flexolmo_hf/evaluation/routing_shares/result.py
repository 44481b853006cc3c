"""What was measured, what follows from it, and how it goes to a file and back.

Shape letters: D domains, L layers, E experts, P buckets of positions.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from flexolmo_hf.errors import ConfigurationError, DamagedFileError

#: By which measure a share is meant.
Kind = Literal["weight", "top1", "picks"]
KINDS: tuple[Kind, ...] = ("weight", "top1", "picks")


@dataclass(frozen=True, eq=False)
class RoutingShares:
    """The experts' shares of the tokens of some domains. It holds neither tokens nor text.

    Of each kind, the shares of one domain and layer sum to 1. All arrays are float64 but `bucket_tokens`, int64.

    Attributes:
        experts: Names of the experts, in checkpoint order: the set that was measured.
        public: Which of them is the public one; None if it is left out.
        domains: Names of the domains, as given.
        documents: How many documents of each domain held any text.
        tokens: How many tokens of each domain were counted.
        top_k: How many of a token's strongest experts count as picked.
        max_length: Tokens in a window.
        buckets: First and last position of each bucket; the token before a window's first counted one is 0.
        weight: Mean part of the routing mass, ``(D, L, E)``.
        top1: Share of the tokens whose strongest expert it is, ``(D, L, E)``.
        picks: Share of the places among the `top_k` strongest, ``(D, L, E)``.
        entropy: Mean entropy of a token's weights in bits, ``(D, L)``: 0 if one expert has it all.
        agreement: Share of the tokens whose strongest expert is the same in two layers, ``(D, L, L)``.
        bucket_tokens: Tokens counted in each bucket, ``(D, P)``.
        position: `weight` of each bucket, ``(D, P, L, E)``; zeros where no token was counted.
    """

    experts: list[str]
    public: str | None
    domains: list[str]
    documents: list[int]
    tokens: list[int]
    top_k: int
    max_length: int
    buckets: list[tuple[int, int]]
    weight: np.ndarray
    top1: np.ndarray
    picks: np.ndarray
    entropy: np.ndarray
    agreement: np.ndarray
    bucket_tokens: np.ndarray
    position: np.ndarray

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return int(self.weight.shape[1])

    def array(self, kind: Kind = "weight", layer: int | None = None) -> np.ndarray:
        """Return the shares of each domain as an array ``(D, E)``.

        Args:
            kind: By which measure.
            layer: Which layer, from 0, or from the end if negative; None for the mean of all.

        Raises:
            ConfigurationError: If there is no such measure or layer.
        """
        if kind not in KINDS:
            raise ConfigurationError(f"There is no kind of share {kind!r}.", f"Give one of {', '.join(KINDS)}.")
        shares_DLE: np.ndarray = getattr(self, kind)
        if layer is None:
            mean_DE: np.ndarray = shares_DLE.mean(axis=1)
            return mean_DE
        if not -self.layers <= layer < self.layers:
            raise ConfigurationError(f"There is no layer {layer}.", f"Layers are numbered 0 to {self.layers - 1}.")
        return shares_DLE[:, layer]

    def table(self, kind: Kind = "weight", layer: int | None = None) -> dict[str, dict[str, float]]:
        """Return the shares by domain and expert; see `array`."""
        rows = self.array(kind, layer).tolist()
        return {
            domain: dict(zip(self.experts, row, strict=True)) for domain, row in zip(self.domains, rows, strict=True)
        }

    def specialisation(self, kind: Kind = "weight", layer: int | None = None) -> dict[str, float]:
        """Return each expert's share of its own domain minus its mean share of the others.

        1 for an expert that has all of its own and nothing else, 0 for one that makes no difference between domains.

        Args:
            kind: As for `array`.
            layer: As for `array`.

        Returns:
            By expert; only experts that have a domain of their name beside at least one other.
        """
        if len(self.domains) < 2:
            return {}
        shares_DE = self.array(kind, layer)
        found = {}
        for column, expert in enumerate(self.experts):
            if expert in self.domains:
                own = self.domains.index(expert)
                found[expert] = float(shares_DE[own, column] - np.delete(shares_DE[:, column], own).mean())
        return found

    def public_share(self, kind: Kind = "weight", layer: int | None = None) -> dict[str, float] | None:
        """Return the public expert's share of each domain; None if it is left out. See `array`."""
        if self.public is None:
            return None
        return {domain: shares[self.public] for domain, shares in self.table(kind, layer).items()}

    def neighbour_agreement(self) -> tuple[np.ndarray, np.ndarray]:
        """Return how often neighbouring layers agree on a token's strongest expert, and how often by chance.

        Returns:
            Two arrays ``(D, L - 1)``. The second is what layers would reach that choose independently of each other
            with the shares they have.
        """
        above = np.arange(self.layers - 1)
        by_chance = (self.top1[:, :-1] * self.top1[:, 1:]).sum(axis=-1)
        return self.agreement[:, above, above + 1], by_chance

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, dictionaries and numbers, ready for JSON, with the figures that follow."""
        plain = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in asdict(self).items()
        }
        agreement, by_chance = self.neighbour_agreement()
        derived = {
            "shares": {kind: self.table(kind) for kind in KINDS},
            "public_share": self.public_share(),
            "specialisation": {kind: self.specialisation(kind) for kind in KINDS},
            "specialisation_by_layer": [self.specialisation(layer=layer) for layer in range(self.layers)],
            "neighbour_agreement": agreement.tolist(),
            "neighbour_agreement_by_chance": by_chance.tolist(),
        }
        return {**plain, "derived": derived}

    def save(self, file: str | Path) -> Path:
        """Write everything as JSON; `open` reads it back."""
        path = Path(file)
        path.write_text(json.dumps(self.to_dict(), ensure_ascii=False), encoding="utf8")
        return path

    @classmethod
    def open(cls, file: str | Path) -> "RoutingShares":
        """Read what `save` wrote.

        Raises:
            ConfigurationError: If there is no file.
            DamagedFileError: If it holds something else.
        """
        path = Path(file)
        if not path.is_file():
            raise ConfigurationError(
                f"There are no routing shares {path.name!r}.", "Give the routing_shares.json of a report."
            )
        try:
            found = json.loads(path.read_text("utf8"))
            given = {entry.name: found[entry.name] for entry in fields(cls)}
            given["buckets"] = [tuple(pair) for pair in given["buckets"]]
            for entry in fields(cls):
                if entry.type is np.ndarray:
                    given[entry.name] = np.array(given[entry.name])
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedFileError(path.name, "it holds no routing shares") from error
        return cls(**given)
