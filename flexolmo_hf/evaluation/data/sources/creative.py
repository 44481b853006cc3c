"""Creative writing: the six novels of Jane Austen, in the public domain, from an R package."""

import re
from pathlib import Path

from flexolmo_hf.evaluation.data.sources.debian import read_members
from flexolmo_hf.evaluation.data.sources.pieces import in_pieces
from flexolmo_hf.evaluation.data.sources.r_data import read_database

_FOLDER = "usr/lib/R/site-library/janeaustenr/data"
_CHAPTER = re.compile(r"^\s*chapter\s+([ivxlc]+|\d+)\b\.?", re.IGNORECASE)
_LONGEST_PIECE = 2_000


def novels(package: Path) -> list[list[str]]:
    """Read the novels by chapter, each cut between paragraphs into pieces of at most 2,000 characters.

    Returns:
        One list of pieces per chapter; what stands before a novel's first chapter is left out.
    """
    index, data = read_members(package, f"{_FOLDER}/Rdata.rdx", f"{_FOLDER}/Rdata.rdb")
    novels = read_database(index, data)
    return [pieces for name in sorted(novels) for lines in chapters(novels[name]) if (pieces := _pieces(lines))]


def chapters(lines: list[str]) -> list[list[str]]:
    """Cut a novel's lines before each heading of a chapter."""
    found: list[list[str]] = []
    for line in lines:
        if _CHAPTER.match(line):
            found.append([])
        if found:
            found[-1].append(line)
    return found


def _pieces(lines: list[str]) -> list[str]:
    return in_pieces("\n".join(lines).split("\n\n"), longest=_LONGEST_PIECE, joint="\n\n")
