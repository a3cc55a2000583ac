"""The global prefix tree of a batch: which prompts begin alike, and for how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import numpy as np

_WIDTH = 4


@dataclass(frozen=True, slots=True)
class Node:
    """The prompts at ``first`` to ``end - 1`` of the tree's order, at least two, share ``depth`` tokens, and no others
    share as many with all of them. ``parent``: index of the next larger group, None at the root, which holds all.
    """

    depth: int
    first: int
    end: int
    parent: int | None


@dataclass(slots=True)
class _Open:
    """A node whose end is not known yet."""

    depth: int
    first: int
    children: list[int] = field(default_factory=list)


class PrefixTree:
    """``order``: the prompts' indices, sorted by their tokens. ``nodes``: children before parents, the root last."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        # As big-endian bytes, prompts sort as their token ids do.
        packed = [np.asarray(prompt, dtype=f">u{_WIDTH}").tobytes() for prompt in prompts]
        self.order = sorted(range(len(prompts)), key=packed.__getitem__)
        common = [_common(packed[left], packed[right]) for left, right in pairwise(self.order)]
        self.nodes = _nodes(common, len(prompts))
        self._lengths = [0, *accumulate(len(prompts[index]) for index in self.order)]
        self._common = [0, *accumulate(common)]

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return self._lengths[-1]

    @property
    def distinct_tokens(self) -> int:
        """Tokens on the tree's edges: what an oracle computes, each prefix once."""
        return self.distinct(0, len(self.order))

    def distinct(self, first: int, end: int) -> int:
        """Tokens on the paths from the root to these prompts, by their places in the order."""
        if first == end:
            return 0
        return self._lengths[end] - self._lengths[first] - (self._common[end - 1] - self._common[first])

    def children(self) -> list[list[int]]:
        """Of each node, those right below it."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for index, node in enumerate(self.nodes):
            if node.parent is not None:
                found[node.parent].append(index)
        return found

    def deepest(self) -> list[int]:
        """The smallest node that holds each place of the order."""
        found = np.zeros(len(self.order), dtype=np.int64)
        for index in reversed(range(len(self.nodes))):
            node = self.nodes[index]
            found[node.first : node.end] = index
        return [int(index) for index in found]


def _nodes(common: Sequence[int], prompts: int) -> list[Node]:
    """The intervals of the order that share more than what surrounds them, by one pass over what neighbours share."""
    closed: list[Node] = []
    parents: dict[int, int] = {}

    def close(node: _Open, end: int) -> int:
        index = len(closed)
        parents.update(dict.fromkeys(node.children, index))
        closed.append(Node(node.depth, node.first, end, None))
        return index

    stack = [_Open(0, 0)]
    for place, shared in enumerate([*common, 0], start=1):
        first, child = place - 1, None
        while stack[-1].depth > shared:
            top = stack.pop()
            first, child = top.first, close(top, place)
            if stack[-1].depth >= shared:
                stack[-1].children.append(child)
                child = None
        if stack[-1].depth < shared:
            stack.append(_Open(shared, first, [] if child is None else [child]))
    close(stack.pop(), prompts)
    return [Node(node.depth, node.first, node.end, parents.get(index)) for index, node in enumerate(closed)]


def _common(left: bytes, right: bytes) -> int:
    """Tokens at the beginning that are the same in both."""
    size = min(len(left), len(right))
    differ = np.flatnonzero(
        np.frombuffer(left, dtype="u4", count=size // _WIDTH) != np.frombuffer(right, dtype="u4", count=size // _WIDTH)
    )
    return int(differ[0]) if len(differ) else size // _WIDTH
