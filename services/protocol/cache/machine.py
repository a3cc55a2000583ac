"""Who may read, write, move and drop which KV block: the books of one store, without the bytes. DESIGN.md section 7.

A block is absent, then ``Writing`` (one writer holds a lease on its room in RAM), then ``Sealed`` (its bytes are there,
whole, with their checksum), then absent again. A sealed block has a copy in RAM, on disk, or both. A pin, whose number
only the reader knows, keeps a chain of sealed blocks until a time.

    NoTornRead       only sealed blocks are found and read
    PrefixClosed     a sealed block's ancestors are all sealed, and those of one on disk are on disk; a block being
                     written has a parent that is there
    PinnedStays      a pinned block's bytes stay before the pin is released or lapses, even when it is condemned
    OneWriter        one lease at a time on a block, none on a sealed one; a lapsed lease writes and seals nothing
    BytesConserved   room taken in a tier = room of all copies in it, never more than its capacity
    GenMonotone      each use of a key, and of room in RAM, has a generation of its own: no old handle fits a new block
    TenantsApart     by the keys (keys.py): another tenant's root gives other keys

NoSpeculativeSealed, that only committed tokens are put, is the writer's part: a store cannot tell.

Times are seconds on any one clock that does not go back, and come in as arguments. A lease or pin taken at ``now`` for
``ttl`` holds while the time is before ``now + ttl``. After a call, ``drops()`` says which bytes are to be given up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

from countersign.services.protocol.cache.blocks import (
    Block,
    Copy,
    Found,
    Outcome,
    Pin,
    Reserved,
    Stored,
    Tier,
    Transition,
    Writing,
)
from countersign.services.protocol.cache.books import Books
from countersign.services.protocol.cache.integrity import check_blocks, check_pins, check_room
from countersign.services.protocol.cache.order import Policy, Recency
from countersign.services.protocol.errors import CacheCorrupt, CacheError, NotLeased, NotPinned, NotSealable


class BlockCache(Books):
    """The books of one store.

    Args:
        ram: bytes of RAM.
        disk: bytes on disk, 0 for no such tier.
        draw: positive numbers that nobody can guess and that do not come twice: the names of pins and leases.
        grain: a copy's room is its size, rounded up to a multiple of so many bytes.
        policy: what goes first when room is needed, for each tier.
        observer: told of each transition, when it has happened.
    """

    def __init__(
        self,
        ram: int,
        disk: int = 0,
        *,
        draw: Callable[[], int],
        grain: int = 1,
        policy: Callable[[], Policy] = Recency,
        observer: Callable[[Transition], None] | None = None,
    ) -> None:
        super().__init__(ram, disk, grain=grain, policy=policy, observer=observer)
        self._draw = draw
        self._condemned: dict[int, Block] = {}
        self._pins: dict[int, Pin] = {}
        # No lease lapses before this time.
        self._quiet_until = math.inf

    def sealed(self) -> Iterator[Block]:
        """All sealed blocks."""
        return (block for block in self._blocks.values() if block.sealed)

    def __len__(self) -> int:
        """Blocks in the index, those being written included."""
        return len(self._blocks)

    def get(self, key: bytes) -> Block | None:
        """The block of this key, to look at."""
        return self._blocks.get(key)

    @property
    def pins(self) -> int:
        """Pins that were not released and have not been seen to lapse."""
        return len(self._pins)

    # Reading

    def lookup(self, keys: Sequence[bytes], holder: str, *, now: float, ttl: float) -> Found:
        """Pins the longest sealed prefix of a chain of keys, root side first.

        The pin's number is all that it takes to read; ``holder`` is for people.
        """
        chain = self._sealed_prefix(keys)
        if not chain:
            return Found(0, 0)
        expires = now + ttl
        pin = Pin(self._draw(), holder, expires, dict(zip(keys, chain, strict=False)))
        self._pins[pin.number] = pin
        for block in chain:
            block.pins += 1
            block.pinned_until = max(expires, block.pinned_until)
        self._touch(chain[-1])
        if self._observer:
            generations = tuple(block.generation for block in chain)
            self._tell(
                "Lookup",
                keys=tuple(pin.blocks),
                generations=generations,
                holder=holder,
                pin=pin.number,
                expires=expires,
            )
        return Found(len(chain), pin.number)

    def read(self, key: bytes, pin: int, *, now: float) -> Block:
        """The block under this key that the pin keeps: its copies may be read.

        Raises:
            NotPinned: there is no such pin on it, or it was released or has lapsed.
        """
        held = self._pins.get(pin)
        block = held.blocks.get(key) if held is not None and held.expires > now else None
        if block is None or self._blocks.get(key) is not block:
            raise NotPinned("no such pin is on this block", key=key)
        self._say("Read", block, pin=pin)
        return block

    def _sealed_prefix(self, keys: Sequence[bytes]) -> list[Block]:
        chain: list[Block] = []
        above = None
        for key in keys:
            block = self._blocks.get(key)
            if block is None or block.above is not above or block.writing is not None:
                break
            chain.append(block)
            above = block
        return chain

    # Writing

    def reserve(
        self,
        key: bytes,
        parent: bytes,
        size: int,
        holder: str,
        *,
        now: float,
        ttl: float,
        kind: bytes = b"",
        cost: float = 0.0,
    ) -> Reserved:
        """A lease on an absent block, whose parent is sealed, is being written by the same holder, or is empty.

        Takes room in RAM and evicts for it: copies without pin, of blocks without a child there, lowest rank first;
        none when that would not be enough. A holder that asks again for what it is writing gets its lease again,
        renewed. ``cost`` is the time that computing the block took, in any one unit.

        Raises:
            CacheError: ``size`` is not positive.
        """
        if size <= 0:
            raise CacheError("a block has at least one byte", key=key, size=size)
        self._lapse_leases(now)
        block = self._blocks.get(key)
        if block is not None:
            return self._again(block, parent, size, holder, now + ttl)
        refusal = self._refusal(parent, kind, holder)
        if refusal is not None:
            return Reserved(refusal)
        if not self._make_room(Tier.RAM, size, parent, now):
            return Reserved(Outcome.NO_ROOM)
        writing = Writing(self._draw(), holder, now + ttl)
        generation = self._next()
        self._add(Block(key, self._blocks.get(parent), size, kind, writing, generation, generation, cost))
        self._leases[writing.lease] = self._blocks[key]
        self._quiet_until = min(self._quiet_until, writing.expires)
        self._say_reserved(self._blocks[key], writing)
        return Reserved(Outcome.GRANTED, writing.lease)

    def writing(self, key: bytes, lease: int, *, now: float) -> Block:
        """The block that this lease may fill.

        Raises:
            NotLeased: the lease is not on this block, or has lapsed.
        """
        block = self._leases.get(lease)
        if block is None or block.key != key or _lapses(block) <= now:
            raise NotLeased("the lease on this block has lapsed, or never was", key=key)
        return block

    def write(self, key: bytes, lease: int, start: int, length: int, *, now: float) -> Block:
        """``length`` bytes of the block came, from ``start`` on; the block, whose slot they belong into.

        Raises:
            NotLeased: as for `writing`.
            CacheError: they do not lie in the block.
        """
        block = self.writing(key, lease, now=now)
        if start < 0 or length <= 0 or start + length > block.size:
            raise CacheError("these bytes are not of the block", key=key, start=start, length=length, size=block.size)
        if block.writing is not None:
            block.writing.fill(start, start + length)
        self._say("Write", block, lease=lease)
        return block

    def sealable(self, key: bytes, lease: int, *, now: float) -> Block:
        """The block, all of whose bytes came: whoever has them may compare them with their checksum.

        Raises:
            NotLeased: as for `writing`.
            NotSealable: bytes are missing, or the parent is not sealed.
        """
        block = self.writing(key, lease, now=now)
        if block.writing is None or block.writing.filled != [(0, block.size)]:
            raise NotSealable("bytes of the block are missing", key=key)
        if block.above is not None and not block.above.sealed:
            raise NotSealable("the block before it is not sealed", key=key, parent=block.parent)
        return block

    def seal(self, key: bytes, lease: int, checksum: bytes, *, now: float) -> Block:
        """The block's bytes are all there and have this checksum: from now on it is found.

        Raises:
            NotLeased, NotSealable: as for `sealable`.
        """
        block = self.sealable(key, lease, now=now)
        del self._leases[lease]
        block.writing, block.checksum = None, checksum
        block.copies[Tier.RAM] = Copy.WHOLE
        self._touch(block)
        self._say("Seal", block, lease=lease, checksum=checksum)
        return block

    def _again(self, block: Block, parent: bytes, size: int, holder: str, expires: float) -> Reserved:
        writing = block.writing
        if writing is None:
            return Reserved(Outcome.PRESENT)
        if (writing.holder, block.parent, block.size) != (holder, parent, size):
            return Reserved(Outcome.BUSY)
        writing.expires = max(expires, writing.expires)
        self._say_reserved(block, writing)
        return Reserved(Outcome.GRANTED, writing.lease)

    def _refusal(self, parent: bytes, kind: bytes, holder: str) -> Outcome | None:
        above = self._blocks.get(parent)
        if above is None:
            return Outcome.NO_PARENT if parent else None
        if above.writing is not None and above.writing.holder != holder:
            return Outcome.NO_PARENT
        return Outcome.FOREIGN if above.kind != kind else None

    # Giving back

    def release(self, number: int) -> None:
        """Ends a pin, or a lease with all that is being written below it. What is not there is over already."""
        pin, block = self._pins.get(number), self._leases.get(number)
        if pin is not None:
            self._unpin(pin, "Release")
        if block is not None:
            self._abandon(block, "Release")

    def expire(self, now: float) -> None:
        """Ends all pins and leases whose time is over."""
        for pin in [pin for pin in self._pins.values() if pin.expires <= now]:
            self._unpin(pin, "Expire")
        self._lapse_leases(now)

    def _unpin(self, pin: Pin, action: str) -> None:
        del self._pins[pin.number]
        for block in pin.blocks.values():
            block.pins -= 1
            if not block.pins and self._condemned.pop(block.generation, None) is not None:
                self._give_up_all(block)
        self._tell(action, pin=pin.number, holder=pin.holder)

    def _lapse_leases(self, now: float) -> None:
        if now < self._quiet_until:
            return
        for block in [block for block in self._leases.values() if _lapses(block) <= now]:
            if self._blocks.get(block.key) is block:
                self._abandon(block, "Expire")
        self._quiet_until = min((_lapses(block) for block in self._leases.values()), default=math.inf)

    def _abandon(self, block: Block, action: str) -> None:
        """Drops a block that is being written and all below it, which cannot be sealed any more."""
        for each in reversed(self._and_below(block)):
            lease = each.writing.lease if each.writing is not None else 0
            self._remove(each)
            self._give_up_all(each)
            self._say(action, each, lease=lease, gone=True)

    def _and_below(self, block: Block) -> list[Block]:
        found = [block]
        for each in found:
            found.extend(self._blocks[child] for child in each.children)
        return found

    # Between the tiers

    def spill(self, key: bytes, *, now: float) -> Block | None:
        """Begins a copy to disk, taking room; None when there is one, no room, or none of its parent on the way."""
        block = self._blocks.get(key)
        if block is None or block.copies != [Copy.WHOLE, Copy.ABSENT]:
            return None
        if block.above is not None and block.above.copies[Tier.DISK] is Copy.ABSENT:
            return None
        if not self._make_room(Tier.DISK, block.size, block.parent, now):
            return None
        self._take(block, Tier.DISK)
        self._say("Spill", block)
        return block

    def spilled(self, key: bytes, generation: int, *, ok: bool) -> bool:
        """That copy has ended. False: it does not count, because it failed, or its parent's did, or the block has gone.

        So what is on disk is a whole prefix.
        """
        block = self._blocks.get(key)
        if block is not None and (block.generation != generation or block.copies[Tier.DISK] is not Copy.FILLING):
            block = None
        if block is not None:
            ok = ok and (block.above is None or block.above.copies[Tier.DISK] is Copy.WHOLE)
            self._arrived(block, Tier.DISK, ok=ok)
        self._tell("Spilled", key=key, generation=generation, ok=ok and block is not None)
        return ok and block is not None

    def promote(self, key: bytes, *, now: float) -> Block | None:
        """Begins a copy to RAM, in a new slot; None when it is there or finds no room."""
        block = self._blocks.get(key)
        if block is None or block.copies != [Copy.ABSENT, Copy.WHOLE]:
            return None
        if not self._make_room(Tier.RAM, block.size, block.parent, now):
            return None
        block.slot = self._next()
        self._take(block, Tier.RAM)
        self._say("Promote", block)
        return block

    def promoting(self, key: bytes, slot: int) -> Block | None:
        """The block whose copy to RAM is under way in this slot."""
        block = self._blocks.get(key)
        if block is None or block.slot != slot or not block.sealed or block.copies[Tier.RAM] is not Copy.FILLING:
            return None
        return block

    def promoted(self, key: bytes, slot: int, *, ok: bool) -> bool:
        """That copy has ended; ``ok``: the bytes are in the slot and had the checksum. False: the slot is another's."""
        block = self.promoting(key, slot)
        if block is not None:
            self._arrived(block, Tier.RAM, ok=ok)
        self._tell("Promoted", key=key, slot=slot, ok=ok and block is not None)
        return ok and block is not None

    def condemn(self, key: bytes, generation: int) -> int:
        """The block's bytes do not have its checksum: it and all below leave the index at once; how many did.

        What a pin keeps stays in place until the pin ends. Nothing happens when the block is not of this generation.
        """
        block = self._blocks.get(key)
        if block is None or block.generation != generation:
            return 0
        doomed = self._and_below(block)
        for each in reversed(doomed):
            self._remove(each)
            if each.pins:
                self._condemned[each.generation] = each
            else:
                self._give_up_all(each)
            self._say("Condemn", each, gone=True)
        return len(doomed)

    def restore(self, entries: Iterable[Stored]) -> list[bytes]:
        """At the start: blocks that the disk kept are sealed again, each whose ancestors are; the keys of the rest."""
        waiting = {entry.key: entry for entry in entries}
        self._generation = max([self._generation, *(entry.generation for entry in waiting.values())])
        below: dict[bytes, list[Stored]] = {}
        for entry in waiting.values():
            below.setdefault(entry.parent, []).append(entry)
        restored: list[Block] = []
        ready = list(below.get(b"", []))
        for entry in ready:
            above = self._blocks.get(entry.parent)
            if self._capacity_left(Tier.DISK) < self._rounded(entry.size) or (above and above.kind != entry.kind):
                continue
            block = Block(entry.key, above, entry.size, entry.kind, None, entry.generation, 0, checksum=entry.checksum)
            self._add(block, Tier.DISK)
            block.copies[Tier.DISK] = Copy.WHOLE
            restored.append(block)
            del waiting[entry.key]
            ready.extend(below.get(entry.key, []))
        for block in reversed(restored):
            self._touch(block)
        generations = tuple(block.generation for block in restored)
        self._tell("Restore", keys=tuple(block.key for block in restored), generations=generations)
        return list(waiting)

    def _arrived(self, block: Block, tier: Tier, *, ok: bool) -> None:
        if ok:
            block.copies[tier] = Copy.WHOLE
        else:
            self._give_up(block, tier)
        self._offer(block)

    def check_integrity(self) -> None:
        """Counts everything again.

        Raises:
            CacheCorrupt: the books do not agree, which is a bug here.
        """
        kept = [*self._blocks.values(), *self._condemned.values()]
        check_blocks(self._blocks)
        check_room(self._room, self.capacity, [(block, self._rounded(block.size)) for block in kept])
        check_pins(self._pins, kept)
        writing = [block for block in self._blocks.values() if not block.sealed]
        if {id(block) for block in self._leases.values()} != {id(block) for block in writing}:
            raise CacheCorrupt("the index of leases is wrong", leases=len(self._leases))
        if any(not block.pins for block in self._condemned.values()):
            raise CacheCorrupt("a condemned block that no pin keeps", condemned=len(self._condemned))
        for tier in Tier:
            if any(block not in self._orders[tier] for block in self._may_all_go(tier)):
                raise CacheCorrupt("a block that could never be evicted", tier=tier.name)


def _lapses(block: Block) -> float:
    return block.writing.expires if block.writing is not None else math.inf
