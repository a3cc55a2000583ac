"""In which order a batch runs, after BatchLLM (arXiv 2412.03594). Pure.

1. The prompts fall into groups of one shared prefix each, so that no other groups save more tokens: dynamic programming
   over their prefix tree. Unlike BatchLLM's, a group need not be a whole subtree: a part of it may do better apart.
2. The order walks the tree, so that a prefix is computed once and used up before it is evicted, and prompts that begin
   alike follow each other.
3. Of what stands side by side the higher share of decoding goes first: long answers start early, and the prompts of
   later groups fill the passes in which they decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from countersign.batch.prefix_tree import Node, PrefixTree
from countersign.services.protocol.keys import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt's token ids, and how many tokens its answer may have."""

    token_ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs, as they follow in the order, that share their first ``prefix`` tokens, whole pages; 0: one alone."""

    prefix: int
    jobs: Sequence[int]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """``order``: indices of jobs. ``saved``: prompt tokens that sharing within the groups saves."""

    order: Sequence[int]
    groups: Sequence[Group]
    saved: int
    tree: PrefixTree


@dataclass(frozen=True, slots=True)
class _Item:
    """A node or one job by its place in the tree's order, on the walk; ``group``: prefix and places, if one is open."""

    share: float
    first: int
    node: int | None
    group: tuple[int, list[int]]


_ALONE: tuple[int, list[int]] = (0, [])


def plan_batch(jobs: Sequence[Job]) -> BatchPlan:
    """The plan of a batch; the same jobs give the same plan."""
    tree = PrefixTree([job.token_ids for job in jobs])
    own: list[list[int]] = [[] for _ in tree.nodes]
    for place, index in enumerate(tree.deepest()):
        own[index].append(place)
    saved, apart = _group(tree, own)
    order, groups = _Walk(tree, [jobs[index] for index in tree.order], own, apart).run()
    named = [Group(prefix, [tree.order[place] for place in places]) for prefix, places in groups]
    return BatchPlan([tree.order[place] for place in order], named, saved, tree)


def shareable(tokens: int) -> int:
    """Those in whole pages: what a cache can share of a prefix."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def _group(tree: PrefixTree, own: Sequence[Sequence[int]]) -> tuple[int, list[int]]:
    """The tokens saved, and of each node the tokens that the group around it must share to be better than its own.

    A job is in the group of the deepest node above it that has one: a group of n jobs saves (n - 1) * prefix. Below a
    group that shares ``p`` pages, ``best(node, p) = max(along(p), along(depth) - depth)``, where
    ``along(p) = p * jobs of its own + sum of best(child, p)`` grows with ``p``: from some ``p`` on it is the larger.
    """
    around: dict[int, np.ndarray[tuple[int], np.dtype[np.int64]]] = {}
    apart = []
    best = np.zeros(1, dtype=np.int64)
    for index, node in enumerate(tree.nodes):
        pages = np.arange(node.depth // BLOCK_TOKENS + 1)
        along = around.pop(index, 0) + pages * len(own[index])
        group = along[-1] - pages[-1]
        apart.append(int(np.count_nonzero(along < group)) * BLOCK_TOKENS)
        best = np.maximum(along, group)
        if node.parent is not None:
            above = tree.nodes[node.parent].depth // BLOCK_TOKENS + 1
            around[node.parent] = around.get(node.parent, 0) + best[:above]
    return int(best[0]) * BLOCK_TOKENS, apart


class _Walk:
    """Depth first through the tree; places are those of its order, as are ``jobs``."""

    def __init__(
        self, tree: PrefixTree, jobs: Sequence[Job], own: Sequence[Sequence[int]], apart: Sequence[int]
    ) -> None:
        self._tree, self._jobs, self._own, self._apart = tree, jobs, own, apart
        self._children = tree.children()
        self._decodes = [0, *accumulate(job.max_tokens for job in jobs)]

    def run(self) -> tuple[list[int], list[tuple[int, list[int]]]]:
        """All places; prefix and places of each group."""
        order: list[int] = []
        groups: list[tuple[int, list[int]]] = []
        left = [_Item(0.0, 0, len(self._tree.nodes) - 1, _ALONE)]
        while left:
            item = left.pop()
            if item.node is None:
                order.append(item.first)
                if item.group is _ALONE:
                    groups.append((0, [item.first]))
                else:
                    item.group[1].append(item.first)
                continue
            group = item.group
            if group[0] < self._apart[item.node]:
                group = (shareable(self._tree.nodes[item.node].depth), [])
                groups.append(group)
            # The last is visited first: the highest share, of equal ones the first in the tree.
            left += sorted(self._items(item.node, group), key=lambda each: (each.share, -each.first))
        return order, groups

    def _items(self, index: int, group: tuple[int, list[int]]) -> Iterator[_Item]:
        node = self._tree.nodes[index]
        for child in self._children[index]:
            below = self._tree.nodes[child]
            yield _Item(self._share(node, below.first, below.end), below.first, child, group)
        for place in self._own[index]:
            yield _Item(self._share(node, place, place + 1), place, None, group)

    def _share(self, above: Node, first: int, end: int) -> float:
        """Tokens to decode for one of prompt behind what the node above has."""
        prompts = self._tree.distinct(first, end) - above.depth
        return (self._decodes[end] - self._decodes[first]) / max(prompts, 1)
