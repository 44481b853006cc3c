"""Documents that mix domains: what no single expert knows all of, and where choosing per token can pay.

Two kinds: made ones, which put two documents of different domains into each other, and real ones, which are chosen
because they mix by nature. All are made of held-out text.
"""

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from flexolmo_hf.evaluation.data.corpus import Corpus

PAIRS = "mixed: pairs"
CODE_WITH_PROSE = "mixed: code with prose"
FORMULAS = "mixed: formulas in papers"

# A sentence with the white space after it, or a line with its end, which code and verse need.
_SENTENCE = re.compile(r".+?(?:[.!?][\"')\]]*[^\S\n]+|\n+|$)", re.DOTALL)
_SEGMENT = 200
_MOST_ALTERNATIONS = 5
# A comment line, or a string in triple quotes that begins a line: a docstring, nearly always.
_PROSE = re.compile(
    r"^[^\S\n]*(?:#[^\n]*|[rRuU]?(?P<quotes>\"\"\"|''').*?(?:(?P=quotes)|\Z))", re.DOTALL | re.MULTILINE
)
_PROSE_SHARE = (0.4, 0.8)
# Some papers come with marks where their formulas stood.
_FORMULA = re.compile(r"(?:INLINE|DISPLAY)FORM\d+|\$[^$\n]{1,80}\$")
_FORMULAS_PER_1000 = 4


def mixed_documents(
    corpus: Corpus, split: str = "test", *, budget: int = 280_000, seed: int = 0
) -> dict[str, list[str]]:
    """Make and choose documents that mix domains.

    Args:
        corpus: What they are made of.
        split: Which of its splits; ``"validation"`` to choose settings with.
        budget: Bytes of each kind at most; the pairs of domains share them equally.
        seed: Decides which documents meet in the pairs.

    Returns:
        Texts by kind. ``"mixed: pairs"``: some sentences of one domain, some of another, and so on, for every pair of
        the corpus' domains. ``"mixed: code with prose"``: modules of which 40 to 80% are docstrings and comments.
        ``"mixed: formulas in papers"``: passages of papers with four formulas or more in a thousand characters (many
        of QASPER's papers hold a mark in the place of each). A kind whose domain the corpus does not have is left out.
    """
    texts = {domain: corpus.documents(domain, split) for domain in corpus.domains}
    found: dict[str, list[str]] = {}
    if len(texts) > 1:
        pairs = list(itertools.combinations(texts, 2))
        found[PAIRS] = [
            text
            for first, second in pairs
            for text in _up_to(budget // len(pairs), _woven(texts[first], texts[second], f"{seed} {first} {second}"))
        ]
    if "code" in texts:
        found[CODE_WITH_PROSE] = list(_up_to(budget, filter(_is_commented, texts["code"])))
    if "academic" in texts:
        found[FORMULAS] = list(_up_to(budget, filter(_is_formal, texts["academic"])))
    return found


def _up_to(budget: int, texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        budget -= len(text.encode())
        if budget < 0:
            return
        yield text


def _woven(first: Sequence[str], second: Sequence[str], seed: str) -> Iterator[str]:
    """Pair the documents of two domains at random, each used once, and take segments of both in turn."""
    order = random.Random(seed)
    shuffled: Callable[[Sequence[str]], list[str]] = lambda texts: order.sample(list(texts), len(texts))  # noqa: E731
    for one, other in zip(shuffled(first), shuffled(second), strict=False):
        turns = list(zip(_segments(one), _segments(other), strict=False))[:_MOST_ALTERNATIONS]
        if len(turns) > 1:
            if order.random() < 0.5:
                turns = [(right, left) for left, right in turns]
            yield "\n\n".join(segment for turn in turns for segment in turn)


def _segments(text: str) -> list[str]:
    """Cut a text into runs of whole sentences or lines of some 200 characters; a shorter rest is left out."""
    segments, current = [], ""
    for sentence in _SENTENCE.findall(text):
        current += sentence
        if len(current) >= _SEGMENT:
            segments.append(current.strip("\n"))
            current = ""
    return segments


def _is_commented(module: str) -> bool:
    prose = sum(len(found.group()) for found in _PROSE.finditer(module))
    return _PROSE_SHARE[0] <= prose / len(module) <= _PROSE_SHARE[1]


def _is_formal(passage: str) -> bool:
    return len(_FORMULA.findall(passage)) * 1000 >= _FORMULAS_PER_1000 * len(passage)
