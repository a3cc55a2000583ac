"""Moves copies between RAM and disk. The disk has one thread, whose jobs run in the order in which they were given."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from countersign.services.kv.arena import Arena
from countersign.services.kv.disk import Disk
from countersign.services.protocol.cache import Block, BlockCache, Copy, Stored, Tier
from countersign.services.runtime.background import Background
from countersign.services.runtime.waiting import happened

# Bytes of one transaction, and of one read that is brought into RAM.
BATCH_BYTES = 16 << 20
NICENESS = 10
# Blocks that the disk still holds though the books dropped them.
MOST_DROPPED = 256

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Mover:
    """Spills what is sealed, oldest first, and promotes what is asked for.

    ``settle`` gives up what the books dropped; it is called after each change.
    """

    def __init__(
        self, cache: BlockCache, arena: Arena, disk: Disk, settle: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self._cache = cache
        self._arena = arena
        self._disk = disk
        self._settle = settle
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "disk", _stand_back)
        self._to_drop: list[tuple[bytes, int]] = []
        self._to_spill: deque[bytes] = deque()
        self._background = Background()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.damaged = 0

    async def restore(self) -> int:
        """Takes over what an earlier process left; the number of blocks."""
        entries = await self._on_disk(self._disk.entries)
        lost = self._cache.restore(entries)
        await self._on_disk(self._disk.forget, lost)
        return len(entries) - len(lost)

    def sealed(self, key: bytes) -> None:
        """A block is new in RAM."""
        self._to_spill.append(key)
        self._idle.clear()
        self._wake.set()

    def dropped(self, key: bytes, generation: int) -> None:
        """The books have no copy of it on disk any more."""
        self._to_drop.append((key, generation))
        if len(self._to_drop) >= MOST_DROPPED:
            self._drop()

    async def run(self) -> None:
        """Spills for ever."""
        while True:
            batch = self._next_batch()
            if batch:
                await self._spill(batch)
            elif not self._to_spill:
                self._wake.clear()
                self._idle.set()
                await self._wake.wait()

    async def drained(self) -> None:
        """Until everything that is sealed now is on disk, or found no room there."""
        await self._idle.wait()

    async def promote(self, keys: Sequence[bytes], wait: float) -> None:
        """Brings blocks that lie on disk only into RAM, as far as there is room; damaged ones are condemned.

        Returns after ``wait`` seconds at the latest; the rest comes all the same, also when the caller is cancelled.
        """
        done = asyncio.Event()
        self._background.spawn(self._promote(keys, done))
        await happened(done, wait)

    async def _promote(self, keys: Sequence[bytes], done: asyncio.Event) -> None:
        waiting = deque(keys)
        try:
            while waiting:
                moving = self._begin(waiting)
                data = await self._on_disk(self._read_all, [entry for _, entry in moving])
                for (slot, entry), block_data in zip(moving, data, strict=True):
                    self._promoted(entry, slot, block_data)
        finally:
            done.set()

    def _drop(self) -> None:
        """Has the disk forget what was dropped, in one transaction, before it does anything else."""
        dropped, self._to_drop = self._to_drop, []
        if dropped:
            self._thread.submit(self._disk.drop, dropped)

    def _begin(self, waiting: deque[bytes]) -> list[tuple[int, Stored]]:
        """Takes room for the next few; their slots."""
        moving: list[tuple[int, Stored]] = []
        size = 0
        while waiting and size < BATCH_BYTES:
            block = self._cache.promote(waiting.popleft(), now=self._clock())
            self._settle()
            if block is not None:
                self._arena.take(block.slot, block.size)
                moving.append((block.slot, entry_of(block)))
                size += block.size
        return moving

    async def read(self, block: Block) -> bytes | None:
        """A block's bytes from disk; None when they are damaged, and the block is condemned then."""
        entry = entry_of(block)
        data = await self._on_disk(self._disk.get, entry)
        if data is None and self._cache.get(entry.key) is block:
            self._condemn(entry)
        return data

    async def close(self) -> None:
        """Ends the thread, its jobs done."""
        await self._background.drain()
        await self._on_disk(self._disk.close)
        self._thread.shutdown(wait=True)

    def _next_batch(self) -> list[tuple[Stored, bytes]]:
        batch: list[tuple[Stored, bytes]] = []
        size = 0
        while self._to_spill and size < BATCH_BYTES:
            spilling = self._cache.spill(self._to_spill.popleft(), now=self._clock())
            self._settle()
            if spilling is not None:
                batch.append((entry_of(spilling), self._arena.read(spilling.slot)))
                size += spilling.size
        return batch

    async def _spill(self, batch: Sequence[tuple[Stored, bytes]]) -> None:
        """Parents first, all or none."""
        ok = await self._on_disk(self._disk.put, batch)
        for entry, _ in batch:
            self._cache.spilled(entry.key, entry.generation, ok=ok)
            self._settle()

    def _promoted(self, entry: Stored, slot: int, data: bytes | None) -> None:
        if self._cache.promoting(entry.key, slot) is None:
            return  # it went meanwhile, and its slot with it
        if data is not None:
            self._arena.write(slot, 0, data)
        self._cache.promoted(entry.key, slot, ok=data is not None)
        self._settle()
        if data is None:
            self._condemn(entry)

    def _condemn(self, entry: Stored) -> None:
        self.damaged += 1
        gone = self._cache.condemn(entry.key, entry.generation)
        self._settle()
        _log.warning("a block on disk is damaged", extra={"key": entry.key.hex(), "gone": gone})

    def _read_all(self, entries: Sequence[Stored]) -> list[bytes | None]:
        return [self._disk.get(entry) for entry in entries]

    async def _on_disk(self, work: Callable[..., _T], *arguments: object) -> _T:
        self._drop()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)


def _stand_back() -> None:
    """The disk's thread takes what processor others leave: on this host somebody may be in the middle of an answer."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)


def entry_of(block: Block) -> Stored:
    """The block as the disk keeps it."""
    return Stored(block.key, block.parent, block.size, block.kind, block.checksum, block.generation)


def in_ram(block: Block) -> bool:
    """Readers may map it."""
    return block.copies[Tier.RAM] is Copy.WHOLE
