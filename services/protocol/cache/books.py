"""What lies where in a store: the index, the room of each tier, and what goes when one is full. Without the bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from countersign.services.protocol.cache.blocks import Block, Copy, Drop, Tier, Transition, Writing
from countersign.services.protocol.cache.order import Order, Policy


class Books:
    """The index and the room of ``ram`` and ``disk`` bytes; the rest as for `BlockCache`."""

    def __init__(
        self,
        ram: int,
        disk: int,
        *,
        grain: int,
        policy: Callable[[], Policy],
        observer: Callable[[Transition], None] | None,
    ) -> None:
        self.capacity = (ram, disk)
        self.evictions = [0, 0]
        self._grain = grain
        self._policy = policy()
        self._observer = observer
        self._blocks: dict[bytes, Block] = {}
        self._leases: dict[int, Block] = {}
        self._orders = (Order(), Order())
        self._room = [0, 0]
        self._generation = 0
        self._drops: list[Drop] = []

    def room(self, tier: Tier) -> int:
        """Bytes taken in a tier: sealed, being written, or on their way; condemned ones too while a pin keeps them."""
        return self._room[tier]

    def drops(self) -> list[Drop]:
        """The copies given up since the last call, in order."""
        drops, self._drops = self._drops, []
        return drops

    # Eviction

    def _touch(self, block: Block) -> None:
        """It was used, and so were all before it: they take its rank over when it goes."""
        block.uses += 1
        block.rank = self._policy.used(block)
        self._offer(block)

    def _bequeath(self, block: Block) -> None:
        """A copy of it goes: the block before it was used whenever it was."""
        above = block.above
        if above is not None:
            above.uses = max(above.uses, block.uses)
            above.rank = max(above.rank, block.rank)
            self._offer(above)

    def _offer(self, block: Block) -> None:
        """Notes a block as one to evict, where it may go."""
        for tier in Tier:
            if self._may_go(block, tier):
                self._orders[tier].offer(block, partial(self._may_all_go, tier), len(self._blocks))

    def _may_all_go(self, tier: Tier) -> Iterator[Block]:
        return (block for block in self._blocks.values() if self._may_go(block, tier))

    @staticmethod
    def _may_go(block: Block, tier: Tier, copies_gone: int = 0, children_gone: int = 0) -> bool:
        """Its copy in this tier may: no child has one there, and if it is the last copy there is no child at all."""
        if not block.sealed or block.copies[tier] is not Copy.WHOLE or block.below[tier] > copies_gone:
            return False
        other = block.copies[Tier.DISK if tier is Tier.RAM else Tier.RAM]
        if other is Copy.FILLING and tier is Tier.DISK:
            return False  # it is being read for that
        return other is Copy.WHOLE or len(block.children) <= children_gone

    def _make_room(self, tier: Tier, size: int, parent: bytes, now: float) -> bool:
        """Evicts until ``size`` more bytes fit; nothing when they cannot. The new copy's ``parent`` stays (on disk)."""
        victims = self._victims(tier, self._rounded(size) - self._capacity_left(tier), parent, now)
        for victim in victims or ():
            self._evict(victim, tier)
        return victims is not None

    def _victims(self, tier: Tier, missing: int, parent: bytes, now: float) -> list[Block] | None:
        """Blocks whose copies have at least ``missing`` bytes, in the order to evict; None when there are too few."""
        victims: list[Block] = []
        copies_gone, children_gone = defaultdict[bytes, int](int), defaultdict[bytes, int](int)
        gone: set[int] = set()
        kept: list[Block] = []
        while missing > 0 and (entry := self._orders[tier].pop()) is not None:
            rank, generation, key = entry
            block = self._blocks.get(key)
            if block is None or block.generation != generation or block.rank != rank or generation in gone:
                continue
            if not self._may_go(block, tier, copies_gone[key], children_gone[key]):
                continue
            kept.append(block)
            if block.pinned(now) or (key == parent and (tier is Tier.DISK or self._is_last(block))):
                continue
            victims.append(block)
            gone.add(generation)
            missing -= self._rounded(block.size)
            copies_gone[block.parent] += 1
            children_gone[block.parent] += self._is_last(block)
            above = block.above
            self._bequeath(block)
            if above is not None and self._may_go(above, tier, copies_gone[above.key], children_gone[above.key]):
                self._orders[tier].push(above)
        for block in kept:
            self._orders[tier].push(block)
        return victims if missing <= 0 else None

    @staticmethod
    def _is_last(block: Block) -> bool:
        return block.copies.count(Copy.WHOLE) == 1

    def _evict(self, block: Block, tier: Tier) -> None:
        last = self._is_last(block)
        self._policy.evicted(block)
        self.evictions[tier] += 1
        if last:
            self._remove(block)
            self._give_up_all(block)
        else:
            self._give_up(block, tier)
            self._offer(block)
        self._say("Evict", block, tier=tier, gone=last)

    # Room and index

    def _next(self) -> int:
        self._generation += 1
        return self._generation

    def _rounded(self, size: int) -> int:
        return -(-size // self._grain) * self._grain

    def _capacity_left(self, tier: Tier) -> int:
        return self.capacity[tier] - self._room[tier]

    def _add(self, block: Block, tier: Tier = Tier.RAM) -> None:
        self._blocks[block.key] = block
        if block.above is not None:
            block.above.children.add(block.key)
        self._take(block, tier)

    def _take(self, block: Block, tier: Tier) -> None:
        block.copies[tier] = Copy.FILLING
        self._room[tier] += self._rounded(block.size)
        if block.above is not None:
            block.above.below[tier] += 1

    def _give_up(self, block: Block, tier: Tier) -> None:
        """The copy's room comes back; a block that is in the index lets its parent know."""
        block.copies[tier] = Copy.ABSENT
        self._room[tier] -= self._rounded(block.size)
        self._drops.append(Drop(tier, block.key, block.slot if tier is Tier.RAM else block.generation))
        if block.above is not None and self._blocks.get(block.key) is block:
            block.above.below[tier] -= 1
            self._bequeath(block)

    def _give_up_all(self, block: Block) -> None:
        """Of a block that is out of the index."""
        for tier in Tier:
            if block.copies[tier] is not Copy.ABSENT:
                self._give_up(block, tier)

    def _remove(self, block: Block) -> None:
        """Out of the index; its copies are still there."""
        del self._blocks[block.key]
        if block.writing is not None:
            del self._leases[block.writing.lease]
        above = block.above
        if above is not None:
            above.children.discard(block.key)
            for tier in Tier:
                above.below[tier] -= block.copies[tier] is not Copy.ABSENT
            self._bequeath(block)

    # The observer

    def _tell(self, action: str, **fields: Any) -> None:
        if self._observer is not None:
            self._observer(Transition(action, room=(self._room[0], self._room[1]), **fields))

    def _say(self, action: str, block: Block, **fields: Any) -> None:
        if self._observer is not None:
            who = {"key": block.key, "parent": block.parent, "generation": block.generation, "slot": block.slot}
            self._tell(action, size=block.size, **who, **fields)

    def _say_reserved(self, block: Block, writing: Writing) -> None:
        self._say("Reserve", block, holder=writing.holder, lease=writing.lease, expires=writing.expires)
