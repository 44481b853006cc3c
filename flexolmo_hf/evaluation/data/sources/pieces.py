"""Cutting long documents into pieces at the borders they have themselves."""

from collections.abc import Iterable


def in_pieces(parts: Iterable[str], *, longest: int, joint: str) -> list[str]:
    """Join neighbouring parts to pieces of at most a length.

    Args:
        parts: Paragraphs, in order. One that is too long is cut between its lines; a line is never cut.
        longest: Characters of a piece.
        joint: What stands between two parts.

    Returns:
        The pieces, none of them blank.
    """
    pieces: list[str] = []
    for part in filter(str.strip, parts):
        if len(part) > longest and "\n" in part:
            pieces += in_pieces(part.split("\n"), longest=longest, joint="\n")
        elif pieces and len(pieces[-1]) + len(joint) + len(part) <= longest:
            pieces[-1] += joint + part
        else:
            pieces.append(part)
    return pieces
