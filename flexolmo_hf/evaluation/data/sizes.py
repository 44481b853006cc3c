"""How large a corpus is: a table and a figure, one bar per domain and split."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flexolmo_hf.evaluation.data.corpus import Corpus
from flexolmo_hf.evaluation.figures import COLOURS, HATCHES, figure, save

#: The splits from what is trained on to what is held out, and what figures call them.
SPLITS = {
    "train": "train",
    "web": "seen by the public model",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class SplitSize:
    """What one split of one domain holds."""

    domain: str
    split: str
    documents: int
    bytes: int
    tokens: int


def split_sizes(corpus: Corpus) -> list[SplitSize]:
    """List the sizes of all splits, as the corpus' record states them."""
    return [
        SplitSize(domain, split, rows[split]["documents"], rows[split]["bytes"], rows[split]["tokens"])
        for domain in corpus.domains
        for rows in [corpus.record["domains"][domain]["splits"]]
        for split in SPLITS
        if split in rows
    ]


def draw_sizes(corpus: Corpus, path: str | Path) -> Path:
    """Draw the tokens of each domain, its splits stacked.

    Raises:
        MissingExtraError: If matplotlib is not installed.
    """
    sizes = split_sizes(corpus)
    with figure(7, 0.9 + 0.36 * len(corpus.domains)) as (drawn, axes):
        for (split, label), colour, hatch in zip(SPLITS.items(), COLOURS, HATCHES, strict=False):
            axes.barh(
                corpus.domains,
                [_tokens(sizes, domain, split) for domain in corpus.domains],
                left=[_before(sizes, domain, split) for domain in corpus.domains],
                color=colour,
                hatch=hatch,
                edgecolor="white",
                linewidth=0,
                height=0.7,
                label=label,
            )
        for place, domain in enumerate(corpus.domains):
            total = sum(size.tokens for size in sizes if size.domain == domain)
            documents = sum(size.documents for size in sizes if size.domain == domain)
            axes.annotate(f"{documents:,} texts", (total, place), (4, 0), textcoords="offset points", va="center")
        axes.margins(x=0.14)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g}")
        axes.set_xlabel(f"million tokens ({corpus.record['settings']['tokens']})")
        axes.set_title("Tokens of each domain, by split")
        axes.legend(loc="lower right")
        return save(drawn, path)


def _tokens(sizes: list[SplitSize], domain: str, split: str) -> int:
    return sum(size.tokens for size in sizes if (size.domain, size.split) == (domain, split))


def _before(sizes: list[SplitSize], domain: str, split: str) -> int:
    return sum(_tokens(sizes, domain, earlier) for earlier in _until(split))


def _until(split: str) -> Iterator[str]:
    for earlier in SPLITS:
        if earlier == split:
            return
        yield earlier
