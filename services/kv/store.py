"""The bytes of KV blocks, kept in step with the books that the cache protocol keeps."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from countersign.services.kv.arena import PAGE, Arena
from countersign.services.kv.disk import Disk
from countersign.services.kv.mover import Mover, in_ram
from countersign.services.protocol.cache import (
    Block,
    BlockCache,
    Cost,
    Found,
    Outcome,
    Policy,
    Recency,
    Reserved,
    Tier,
    Transition,
)
from countersign.services.protocol.errors import CacheError, NotLeased, NotPinned, NotSealable
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, InvalidArgument

# How long a look-up waits for the disk. What is not in RAM by then can be read all the same.
BRING_S = 0.2
POLICIES: dict[str, Callable[[], Policy]] = {"cost": Cost, "lru": Recency}


@dataclass(frozen=True, slots=True)
class Place:
    """A block that somebody wants to write. ``parent`` is empty for the first of a prompt; ``cost`` in microseconds."""

    key: bytes
    parent: bytes
    cost: float = 0.0


@dataclass(slots=True)
class Counts:
    """Since the start, in blocks."""

    lookups: int = 0
    hits: int = 0
    sealed: int = 0
    read: int = 0
    from_peers: int = 0


class BlockStore:
    """At most ``ram`` bytes of blocks in shared memory, and as many more as ``disk`` takes.

    Who may do what when, the cache protocol says. ``clock`` gives seconds and never goes back; ``ttl`` is in seconds
    too. ``draw`` gives numbers that nobody can guess.
    """

    def __init__(
        self,
        ram: int,
        *,
        disk: Disk | None = None,
        policy: Callable[[], Policy] = Cost,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], int] = lambda: secrets.randbits(63) | 1,
        observer: Callable[[Transition], None] | None = None,
    ) -> None:
        self.arena = Arena("countersign-kv", max(ram // PAGE, 1) * PAGE)
        self.cache = BlockCache(
            self.arena.memory.size,
            disk.capacity if disk is not None else 0,
            draw=draw,
            grain=PAGE,
            policy=policy,
            observer=observer,
        )
        self.draw = draw
        self.counts = Counts()
        self._clock = clock
        self._mover = Mover(self.cache, self.arena, disk, self.settle, clock) if disk is not None else None

    @property
    def damaged(self) -> int:
        """Blocks on disk whose bytes did not have their checksum."""
        return self._mover.damaged if self._mover is not None else 0

    async def start(self) -> int:
        """Takes over what the disk kept; the number of blocks."""
        return await self._mover.restore() if self._mover is not None else 0

    async def run(self) -> None:
        """Writes to disk what is sealed, for ever."""
        if self._mover is not None:
            await self._mover.run()

    async def drained(self) -> None:
        """Until all that is sealed now is on disk, as far as there is room."""
        if self._mover is not None:
            await self._mover.drained()

    async def close(self) -> None:
        if self._mover is not None:
            await self._mover.close()
        self.arena.close()

    # Reading

    def lookup(self, keys: Sequence[bytes], holder: str, *, ttl: float) -> Found:
        """Pins the longest sealed prefix of the chain ``keys``."""
        return self.cache.lookup(keys, holder, now=self._clock(), ttl=ttl)

    async def bring(self, keys: Sequence[bytes], pin: int) -> list[Block]:
        """The blocks of pinned ``keys``, in RAM as far as room and time allow; fewer when one was damaged."""
        blocks = self.readable(keys, pin)
        away = [block.key for block in blocks if not in_ram(block)]
        if not away or self._mover is None:
            return blocks
        await self._mover.promote(away, BRING_S)
        return self.readable(keys, pin)

    def readable(self, keys: Sequence[bytes], pin: int) -> list[Block]:
        """The blocks under ``keys`` up to the first that the pin does not keep."""
        blocks: list[Block] = []
        for key in keys:
            try:
                blocks.append(self.cache.read(key, pin, now=self._clock()))
            except NotPinned:
                break
        return blocks

    def block(self, key: bytes, pin: int) -> Block:
        """A block that may be read.

        Raises:
            FailedPrecondition: reason NOT_PINNED.
        """
        try:
            return self.cache.read(key, pin, now=self._clock())
        except NotPinned as error:
            raise _not_pinned(key) from error

    async def read(self, block: Block, pin: int, start: int, stop: int) -> bytes:
        """Bytes of a block that is still pinned.

        Raises:
            FailedPrecondition: reason NOT_PINNED.
            DataLoss: reason BLOCK_DAMAGED: they are not what was written, and the block is gone.
        """
        if self.block(block.key, pin) is not block:
            raise _not_pinned(block.key)
        if in_ram(block):
            return self.arena.read(block.slot, start, stop)
        data = await self._mover.read(block) if self._mover is not None else None
        if data is None:
            text = f"block {block.key.hex()} was damaged on disk and is gone"
            raise DataLoss(text, reason="BLOCK_DAMAGED", help="compute it again", key=block.key.hex())
        return data[start:stop]

    # Writing

    def reserve(self, places: Iterable[Place], size: int, kind: bytes, holder: str, *, ttl: float) -> list[Reserved]:
        """A lease for each place, parents first, or why there is none."""
        return [self._reserve(place, size, kind, holder, ttl) for place in places]

    def _reserve(self, place: Place, size: int, kind: bytes, holder: str, ttl: float) -> Reserved:
        now = self._clock()
        reserved = self.cache.reserve(
            place.key, place.parent, size, holder, now=now, ttl=ttl, kind=kind, cost=place.cost
        )
        self.settle()
        if reserved.outcome is Outcome.GRANTED:
            block = self.cache.writing(place.key, reserved.lease, now=now)
            if block.slot not in self.arena:
                self.arena.take(block.slot, size)
        return reserved

    def write(self, key: bytes, lease: int, start: int, data: bytes | memoryview) -> None:
        """Bytes of a block from ``start`` on.

        Raises:
            FailedPrecondition: reason LEASE_EXPIRED.
            InvalidArgument: reason SIZE_MISMATCH: they do not lie in the block.
        """
        try:
            block = self.cache.write(key, lease, start, len(data), now=self._clock())
        except NotLeased as error:
            raise _lapsed(key) from error
        except CacheError as error:
            text = f"block {key.hex()} has no bytes {start} to {start + len(data)}"
            raise InvalidArgument(text, reason="SIZE_MISMATCH", key=key.hex()) from error
        self.arena.write(block.slot, start, data)

    def seal(self, key: bytes, lease: int, checksum: bytes) -> Block:
        """The block, which is all there. One whose bytes are not what was sent is given up at once.

        Raises:
            FailedPrecondition: reason LEASE_EXPIRED, or NOT_SEALABLE: bytes or the block before it are missing.
            DataLoss: reason CHECKSUM_MISMATCH.
        """
        try:
            block = self.cache.sealable(key, lease, now=self._clock())
            if self.arena.checksum(block.slot) != checksum:
                self.release([lease])
                text = f"the bytes of block {key.hex()} do not have the checksum that came with them"
                raise DataLoss(text, reason="CHECKSUM_MISMATCH", help="send the block again", key=key.hex())
            self.cache.seal(key, lease, checksum, now=self._clock())
        except NotLeased as error:
            raise _lapsed(key) from error
        except NotSealable as error:
            text = f"block {key.hex()} cannot be sealed: {error.message}"
            help_ = "send all its parts, and the blocks before it first"
            raise FailedPrecondition(text, reason="NOT_SEALABLE", help=help_, key=key.hex()) from error
        self.counts.sealed += 1
        if self._mover is not None:
            self._mover.sealed(key)
        return block

    # Giving back

    def release(self, numbers: Iterable[int]) -> None:
        """Ends pins and leases."""
        for number in numbers:
            self.cache.release(number)
        self.settle()

    def expire(self) -> None:
        """Ends what has lapsed."""
        self.cache.expire(self._clock())
        self.settle()

    def settle(self) -> None:
        """Gives up the bytes that the books dropped."""
        for drop in self.cache.drops():
            if drop.tier is Tier.RAM:
                self.arena.give(drop.generation)
            elif self._mover is not None:
                self._mover.dropped(drop.key, drop.generation)

    def check_integrity(self) -> None:
        """Compares the bytes with the books, and each block in RAM with its checksum.

        Raises:
            CacheCorrupt: the books do not agree with themselves.
            DataLoss: reason BLOCK_LOST: a block's bytes are missing, kept after the block, or not what was sealed.
        """
        self.cache.check_integrity()
        here = [block for block in self.cache.sealed() if in_ram(block)]
        if any(block.slot not in self.arena or self.arena.checksum(block.slot) != block.checksum for block in here):
            raise DataLoss("the blocks' bytes are not those in the books", reason="BLOCK_LOST")
        if self.arena.taken != self.cache.room(Tier.RAM):
            raise DataLoss("room in RAM is taken by no block", reason="BLOCK_LOST")


def _not_pinned(key: bytes) -> FailedPrecondition:
    return FailedPrecondition(
        f"there is no such pin on block {key.hex()}",
        reason="NOT_PINNED",
        help="look the block up first, and read it before the pin lapses",
        key=key.hex(),
    )


def _lapsed(key: bytes) -> FailedPrecondition:
    return FailedPrecondition(
        f"the lease on block {key.hex()} has lapsed, or never was",
        reason="LEASE_EXPIRED",
        help="reserve the block again, and write it within ttl_ms",
        key=key.hex(),
    )
