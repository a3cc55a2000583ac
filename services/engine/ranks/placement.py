"""Which rank keeps which keys: a function of a token's position alone, the same for every sequence. Pure.

A sequence is cut into units of some leaves (kernels/merge.py); units go to the ranks in zigzag, 0 1 .. N-1 N-1 .. 1 0,
so that a causal prompt is the same work for all. Sequences that share a prefix then share its pages where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from countersign.kernels.merge import Node, nodes_of
from countersign.services.engine.pages import PAGE_TOKENS

LEAF = 64
"""Keys of a leaf; the C code's."""


@dataclass(frozen=True, slots=True)
class Run:
    """Positions [first, end) of a sequence."""

    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Placement:
    """``unit``: tokens, LEAF times a power of two."""

    ranks: int
    unit: int

    def __post_init__(self) -> None:
        leaves, rest = divmod(self.unit, LEAF)
        if self.ranks < 1 or rest or leaves < 1 or leaves & (leaves - 1):
            raise ValueError(f"{self.ranks} ranks with units of {self.unit} tokens: not {LEAF} times a power of two")

    @staticmethod
    def of(ranks: int, context_length: int, unit: int = 0) -> Placement:
        """With ``unit`` 0 some eight units a rank at the longest context: fewer leave ranks idle, more send more."""
        least = max(LEAF, context_length // (8 * ranks))
        return Placement(ranks, unit or LEAF << (-(-least // LEAF) - 1).bit_length())

    def rank_of(self, position: int) -> int:
        """Who keeps the keys at this position."""
        place = position // self.unit % (2 * self.ranks)
        return min(place, 2 * self.ranks - 1 - place)

    def rank_of_page(self, index: int) -> int:
        """Who keeps a sequence's page number ``index``."""
        return self.rank_of(index * PAGE_TOKENS)

    def runs(self, rank: int, first: int, end: int) -> list[Run]:
        """The rank's positions in [first, end), as long runs in order."""
        found: list[Run] = []
        for start in range(first - first % self.unit, end, self.unit):
            if self.rank_of(start) != rank:
                continue
            run = Run(max(start, first), min(start + self.unit, end))
            if found and found[-1].end == run.first:
                run = Run(found.pop().first, run.end)
            found.append(run)
        return found

    def nodes(self, rank: int, tokens: int, low: int = 0) -> tuple[Node, ...]:
        """The fewest nodes of the canonical tree that hold the rank's keys in [low, tokens) and nobody else's."""
        return _nodes(self, rank, -(-tokens // LEAF), low // LEAF)


@lru_cache(maxsize=4096)
def _nodes(placement: Placement, rank: int, leaves: int, low: int) -> tuple[Node, ...]:
    runs = placement.runs(rank, 0, leaves * LEAF)
    nodes = [node for run in runs for node in nodes_of(run.first // LEAF, run.end // LEAF, leaves)]
    return tuple(node for node in nodes if node.last >= low)
