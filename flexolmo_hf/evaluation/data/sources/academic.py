"""Academic text: the full NLP papers that QASPER asks about (CC BY 4.0)."""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexolmo_hf.evaluation.data.sources.olmes import requested_documents
from flexolmo_hf.evaluation.data.sources.pieces import in_pieces

_LONGEST_PASSAGE = 4_000
# Left over from TeX: sizes of boxes and the like.
_SHORTEST_PARAGRAPH = 20


def papers(wheel: Path) -> list[list[str]]:
    """Read the papers, each cut between paragraphs into passages of at most 4,000 characters.

    Returns:
        One list of passages per paper; the first opens with title and abstract.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {document["title"]: document for document in requested_documents(archive, "qasper_yesno/mc_5shot")}
    return [in_pieces(_paragraphs(paper), longest=_LONGEST_PASSAGE, joint="\n") for paper in found.values()]


def _paragraphs(paper: dict[str, Any]) -> Iterator[str]:
    yield f"{paper['title']}\n{paper['abstract']}"
    for heading, paragraphs in zip(paper["full_text"]["section_name"], paper["full_text"]["paragraphs"], strict=True):
        kept = [paragraph for paragraph in paragraphs if len(paragraph) >= _SHORTEST_PARAGRAPH]
        if kept:
            # "Method ::: Data ::: Tweets" names the sections a section lies in.
            yield "\n".join(filter(None, [(heading or "").split(":::")[-1].strip(), kept[0]]))
            yield from kept[1:]
