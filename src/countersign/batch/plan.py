"""In which order a batch runs, after BatchLLM (arXiv 2412.03594). Pure.

1. The prefix tree of all prompts is cut into groups of one shared prefix each, so that most tokens are saved: dynamic
   programming over the tree.
2. The order walks the tree, so that a prefix is computed once and used up before it is evicted, and groups whose
   prefixes begin alike follow each other.
3. Of what stands side by side the higher share of decoding goes first: long answers start early, and the prompts of
   later groups fill the passes in which they decode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from countersign.batch.prefix_tree import Node, PrefixTree
from countersign.services.protocol.keys import BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt's token ids, and how many tokens its answer may have."""

    token_ids: Sequence[int]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Group:
    """Jobs that follow each other in the order and share their first ``prefix`` tokens, whole pages; 0: one alone."""

    prefix: int
    jobs: Sequence[int]


@dataclass(frozen=True, slots=True)
class BatchPlan:
    """``order``: indices of jobs, group by group. ``saved``: prompt tokens that sharing within the groups saves."""

    order: Sequence[int]
    groups: Sequence[Group]
    saved: int
    tree: PrefixTree


@dataclass(frozen=True, slots=True)
class _Item:
    """A node or one job by its place in the tree's order, on the walk; ``group``: its group, if one is open."""

    share: float
    first: int
    node: int | None
    group: list[int] | None


def plan_batch(jobs: Sequence[Job]) -> BatchPlan:
    """The plan of a batch; the same jobs give the same plan."""
    tree = PrefixTree([job.token_ids for job in jobs])
    saved, cut = _flatten(tree)
    walk = _Walk(tree, [jobs[index] for index in tree.order], cut)
    groups = [Group(prefix, [tree.order[place] for place in places]) for prefix, places in walk.groups()]
    return BatchPlan([job for group in groups for job in group.jobs], groups, saved, tree)


def shareable(tokens: int) -> int:
    """Those in whole pages: what a cache can share of a prefix."""
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def _flatten(tree: PrefixTree) -> tuple[int, list[bool]]:
    """The tokens saved, and of each node whether it is better one group than its children are apart.

    saved(node) = max((jobs - 1) * prefix, sum of saved(children)).
    """
    saved, below = 0, [0] * len(tree.nodes)
    cut = []
    for index, node in enumerate(tree.nodes):
        whole = (node.end - node.first - 1) * shareable(node.depth)
        cut.append(whole > 0 and whole >= below[index])
        saved = max(whole, below[index])
        if node.parent is not None:
            below[node.parent] += saved
    return saved, cut


class _Walk:
    """Depth first through the tree; places are those of its order, as are ``jobs``."""

    def __init__(self, tree: PrefixTree, jobs: Sequence[Job], cut: Sequence[bool]) -> None:
        self._tree, self._jobs, self._cut = tree, jobs, cut
        self._children = tree.children()
        self._alone: list[list[int]] = [[] for _ in tree.nodes]
        for place, index in enumerate(tree.deepest()):
            self._alone[index].append(place)
        self._decodes = [0, *accumulate(job.max_tokens for job in jobs)]

    def groups(self) -> list[tuple[int, list[int]]]:
        """Prefix and places of each group."""
        found: list[tuple[int, list[int]]] = []
        left = [_Item(0.0, 0, len(self._tree.nodes) - 1, None)]
        while left:
            item = left.pop()
            if item.node is None:
                if item.group is None:
                    found.append((0, [item.first]))
                else:
                    item.group.append(item.first)
                continue
            group = item.group
            if group is None and self._cut[item.node]:
                group = []
                found.append((shareable(self._tree.nodes[item.node].depth), group))
            # The last is visited first: the highest share, of equal ones the first in the tree.
            left += sorted(self._items(item.node, group), key=lambda each: (each.share, -each.first))
        return found

    def _items(self, index: int, group: list[int] | None) -> Iterator[_Item]:
        node = self._tree.nodes[index]
        for child in self._children[index]:
            below = self._tree.nodes[child]
            yield _Item(self._share(node, below.first, below.end), below.first, child, group)
        for place in self._alone[index]:
            yield _Item(self._share(node, place, place + 1), place, None, group)

    def _share(self, above: Node, first: int, end: int) -> float:
        """Tokens to decode for one of prompt behind what the node above has."""
        prompts = self._tree.distinct(first, end) - above.depth
        return (self._decodes[end] - self._decodes[first]) / max(prompts, 1)
