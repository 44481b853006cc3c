"""Sharing a domain's documents among its splits: equal token budgets, no copies, nothing contaminated."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from flexolmo_hf.errors import ConfigurationError
from flexolmo_hf.evaluation.data.copies import SeenText
from flexolmo_hf.evaluation.data.sources import Document
from flexolmo_hf.evaluation.data.tokens import TokenCounter


@dataclass
class Sharing:
    """What a domain's splits have got, and what nobody did.

    Attributes:
        splits: The texts of each split.
        tokens: Their tokens.
        copies: How many pieces repeat others, of this domain or an earlier one.
        contaminated: The names (sha256) of pieces that share text with a benchmark.
        unused: Documents that no split needed.
    """

    splits: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    copies: int = 0
    contaminated: list[str] = field(default_factory=list)
    unused: int = 0


@dataclass
class Sharer:
    """Shares documents among splits, one domain after the other.

    Attributes:
        counter: How tokens are counted.
        contaminated: Tells the texts that may be in no split, as pairs of clean texts and names of the others.
        seed: Decides the order of the documents.
        seen: The texts of earlier domains.
    """

    counter: TokenCounter
    contaminated: Callable[[Sequence[str]], tuple[list[str], list[str]]]
    seed: int
    seen: SeenText = field(default_factory=SeenText)

    def share(self, domain: str, documents: Sequence[Document], budgets: Mapping[str, int]) -> Sharing:
        """Fill the splits one after the other with whole documents; the last piece of each is cut to fit.

        Nobody gets the rest of a document that is cut. Later splits depend on earlier ones' budgets, never the other
        way round.

        Args:
            domain: Its name, for errors and the order.
            documents: Lists of pieces; the pieces of one document go to one split.
            budgets: Tokens per split, in the order in which they are filled.

        Raises:
            ConfigurationError: If there is too little text.
        """
        order = random.Random(f"{self.seed} {domain}").sample(range(len(documents)), len(documents))
        sharing = Sharing()
        remaining = (documents[i] for i in order)
        for split, budget in budgets.items():
            sharing.splits[split] = list(self._take(remaining, budget, sharing))
            sharing.tokens[split] = sum(self.counter.count(sharing.splits[split]))
            # One short of the budget is a piece that ended there, or a character that was not torn.
            if sharing.tokens[split] < 0.99 * budget or not sharing.splits[split]:
                raise ConfigurationError(
                    f"The domain {domain!r} has {sharing.tokens[split]:,} tokens left for its split {split!r} where "
                    f"{budget:,} are wanted.",
                    "Ask for less with a smaller budget.",
                )
        sharing.unused = sum(1 for _ in remaining)
        return sharing

    def _take(self, documents: Iterator[Document], budget: int, sharing: Sharing) -> Iterator[str]:
        # Checked first: asking for a document and not using it would lose it.
        while budget > 0 and (document := next(documents, None)) is not None:
            pieces = self._usable(document, sharing)
            for piece, tokens in zip(pieces, self.counter.count(pieces), strict=True):
                text = piece if tokens <= budget else self.counter.cut(piece, budget)
                if text.strip():
                    yield text
                budget -= tokens
                if budget <= 0:
                    break

    def _usable(self, document: Document, sharing: Sharing) -> list[str]:
        clean, contaminated = self.contaminated(document)
        usable = [piece for piece in clean if self.seen.add_unless_copy(piece)]
        sharing.contaminated += contaminated
        sharing.copies += len(clean) - len(usable)
        return usable
