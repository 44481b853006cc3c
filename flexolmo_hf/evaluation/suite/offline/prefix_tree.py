"""A tree of token sequences by their common beginnings, so that each of these is read once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

# Each level costs a pass over the cache, so that a beginning has to be worth it: at least so long, ...
_LEAST = 8
# ... and sparing at least so many tokens.
_SPARED = 24
# A prompt, a passage, a question, its choices. Deeper sharing spares little.
_LEVELS = 4


@dataclass(eq=False)
class Node:
    """Tokens that follow those of the parent.

    Attributes:
        start: Tokens that come before, in all ancestors.
        tokens: The node's own, int64, at least one.
        wanted: Offsets among them, each with a token that is asked about as their successor, and by which sequence.
        children: What follows.
        prompt: What `plant` was told of the node's sequence.
    """

    start: int
    tokens: np.ndarray
    wanted: list[tuple[int, int, int]] = field(default_factory=list)
    children: list["Node"] = field(default_factory=list)
    prompt: int = 0

    @property
    def kept(self) -> int:
        """How many positions from the end reach back to the first that is wanted; 0 if none is."""
        return len(self.tokens) - min(offset for offset, _, _ in self.wanted) if self.wanted else 0


def plant(
    inputs: Sequence[np.ndarray],
    targets: Sequence[Sequence[int]],
    *,
    share: bool,
    prompts: Sequence[int] | None = None,
) -> list[Node]:
    """Build the trees of some sequences.

    Args:
        inputs: Token sequences, int64, none empty. Equal ones become one.
        targets: For each, the tokens that are asked about. The last follows the last input, the others come before.
        share: Whether common beginnings are shared; otherwise each distinct sequence is a root without children.
        prompts: For each, the tokens of its prompt, where these change what is computed: equal sequences with different
            prompts are then distinct. Nothing is shared then.

    Returns:
        The roots. Together the nodes hold every token of every distinct sequence at least once.
    """
    # Big-endian bytes sort as the tokens do, and compare faster.
    owners: dict[tuple[bytes, int], list[int]] = {}
    for index, tokens in enumerate(inputs):
        prompt = 0 if prompts is None else prompts[index]
        owners.setdefault((tokens.astype(">u4").tobytes(), prompt), []).append(index)
    keys = sorted(owners)
    tree = _Tree([np.frombuffer(key, dtype=">u4").astype(np.int64) for key, _ in keys])
    if share and prompts is None:
        roots = tree.grow(0, len(keys), 0, 1)
    else:
        roots = [tree.leaf(i, 0, prompt) for i, (_, prompt) in enumerate(keys)]
    for position, key in enumerate(keys):
        length = len(tree.sequences[position])
        for index in owners[key]:
            _ask(tree.paths[position], length, targets[index], index)
    return roots


def _ask(path: Sequence[Node], length: int, targets: Sequence[int], owner: int) -> None:
    for position, token in enumerate(targets, start=length - len(targets)):
        node = next(node for node in reversed(path) if node.start <= position)
        node.wanted.append((position - node.start, token, owner))


class _Tree:
    def __init__(self, sequences: list[np.ndarray]):
        self.sequences = sequences
        #: For each sequence, the nodes from its root to its end.
        self.paths: list[list[Node]] = [[] for _ in sequences]
        # How many tokens each shares with the one before it.
        self.common = np.array([0, *(_common(*pair) for pair in zip(sequences, sequences[1:], strict=False))])

    def grow(self, first: int, end: int, start: int, level: int) -> list[Node]:
        """Make the nodes of sorted sequences that share their first `start` tokens."""
        nodes = []
        ranges = [(first, end)]
        while ranges:
            low, high = ranges.pop()
            if high - low == 1:
                nodes.append(self.leaf(low, start))
                continue
            shared = int(self.common[low + 1 : high].min())
            if level < _LEVELS and shared - start >= _LEAST and (shared - start) * (high - low - 1) >= _SPARED:
                nodes.append(self._inner(low, high, start, shared, level))
            else:
                ranges.extend(self._apart(low, high, shared))
        return nodes

    def leaf(self, position: int, start: int, prompt: int = 0) -> Node:
        """Make the node of one sequence's end."""
        node = Node(start, self.sequences[position][start:], prompt=prompt)
        self.paths[position].append(node)
        return node

    def _inner(self, low: int, high: int, start: int, shared: int, level: int) -> Node:
        node = Node(start, self.sequences[low][start:shared])
        for position in range(low, high):
            self.paths[position].append(node)
        # The shortest comes first when sorted, and may end here.
        ends_here = len(self.sequences[low]) == shared
        if high - low - ends_here:
            node.children = self.grow(low + ends_here, high, shared, level + 1)
        return node

    def _apart(self, low: int, high: int, shared: int) -> Iterator[tuple[int, int]]:
        cuts = [low, *(low + 1 + np.flatnonzero(self.common[low + 1 : high] == shared)).tolist(), high]
        return zip(cuts[:-1], cuts[1:], strict=True)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
