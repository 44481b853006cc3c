"""How proxy data are searched for."""

from dataclasses import dataclass

from flexolmo_hf.errors import ConfigurationError

#: Fewer usable documents of one kind than this teach a classifier nothing that could be measured.
FEWEST = 20


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """How proxy data are searched for.

    Args:
        train_public: Public documents the classifier sees, drawn at random from all.
        train_private: Private documents it sees.
        held_out: Share of them it is measured on instead.
        candidates: For each document wanted, how many of the best are kept until near-duplicates are removed and the
            choice is made.
        cosine_limit: A candidate with this cosine or more to a private document is a near-duplicate.
        overlap_limit: So is one of whose 13-word sequences this share or more occurs in private documents.
        relevance: For a diverse choice: what relevance is worth against difference; see `pick_diverse`.
        batch_size: Documents embedded at once.
        seed: Decides the samples, the split and the training.
    """

    train_public: int = 10_000
    train_private: int = 10_000
    held_out: float = 0.2
    candidates: int = 4
    cosine_limit: float = 0.95
    overlap_limit: float = 0.2
    relevance: float = 5.0
    batch_size: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("train_public", FEWEST), ("train_private", FEWEST), ("candidates", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ConfigurationError(f"{name} is {getattr(self, name)}.", f"It is at least {least}.")
        if not 0.1 <= self.held_out <= 0.5:
            raise ConfigurationError(f"held_out is {self.held_out}.", "It is a share, 0.1 to 0.5.")
        for name in ("cosine_limit", "overlap_limit"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigurationError(
                    f"{name} is {getattr(self, name)}.", "It is above 0; 1 removes exact copies only."
                )
        if not self.relevance >= 0:
            raise ConfigurationError(f"relevance is {self.relevance}.", "It is 0 or more.")
