"""Which block to evict: the order of those that may go, by one of two policies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from typing import Protocol

from countersign.services.protocol.cache.blocks import Block

Entry = tuple[float, int, bytes]
"""Rank, generation, key: holds while the block has this rank and generation."""


# How much of the mean cost the block counts that is used now.
_LEARN = 0.05


class Policy(Protocol):
    """Gives a block that is used its rank; the lowest is evicted first."""

    def used(self, block: Block) -> float:
        """Its rank from now on."""

    def evicted(self, block: Block) -> None:
        """A block went for lack of room."""


class Recency:
    """Plain LRU."""

    def __init__(self) -> None:
        self._uses = 0

    def used(self, block: Block) -> float:  # noqa: ARG002  as the protocol says
        self._uses += 1
        return self._uses

    def evicted(self, block: Block) -> None:
        """Nothing to learn."""


class Cost:
    """GreedyDual-Size-Frequency (Cherkasova 1998): time of recomputation saved per byte, frequency and recency in one.

    A rank is ``age + uses * cost / size``, where a byte costs 1 at the mean of the costs that were told; ``age`` is the
    rank of the last block that went, so that what is not used any more falls behind, however dear. A block of unknown
    cost, such as one that the disk kept over a restart, counts as one of mean cost.
    """

    def __init__(self) -> None:
        self._age = 0.0
        self._uses = 0
        self._mean = 0.0

    def used(self, block: Block) -> float:
        # Equal ranks go in order of use: what a use adds stays far below any difference of cost.
        self._uses += 1
        return self._age + block.uses * self._relative(block) + self._uses * 1e-9

    def _relative(self, block: Block) -> float:
        """What a byte of it costs, in means."""
        if not block.cost:
            return 1.0
        cost = block.cost / block.size
        self._mean += (cost - self._mean) * _LEARN if self._mean else cost
        return cost / self._mean

    def evicted(self, block: Block) -> None:
        self._age = max(self._age, block.rank)


class Order:
    """The blocks of one tier that may be evicted, and some that might once, lowest rank first: O(log n) a change."""

    def __init__(self) -> None:
        self._heap: list[Entry] = []

    def __contains__(self, block: Block) -> bool:
        return _entry(block) in self._heap

    def offer(self, block: Block, blocks: Callable[[], Iterator[Block]], most: int) -> None:
        """Notes a block; ``blocks`` are all that may go, for when outdated entries are thrown out."""
        heappush(self._heap, _entry(block))
        if len(self._heap) > 4 * most + 64:
            self._heap = [_entry(each) for each in blocks()]
            heapify(self._heap)

    def push(self, block: Block) -> None:
        heappush(self._heap, _entry(block))

    def pop(self) -> Entry | None:
        return heappop(self._heap) if self._heap else None


def _entry(block: Block) -> Entry:
    return (block.rank, block.generation, block.key)
