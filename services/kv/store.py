"""The bytes of KV blocks in memory, kept in step with the books that the cache protocol keeps."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

from countersign.services.protocol.cache import BlockCache
from countersign.services.protocol.errors import NotPinned
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, InvalidArgument


@dataclass(frozen=True, slots=True)
class Place:
    """A block that somebody wants to write. ``parent`` is empty for the first of a prompt."""

    key: bytes
    parent: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Stored:
    """A block's bytes and their SHA-256."""

    checksum: bytes
    data: bytes


class BlockStore:
    """At most ``capacity`` bytes of blocks; who may do what when, the cache protocol says.

    ``clock`` gives seconds and never goes back; ``ttl`` is in seconds too.
    """

    def __init__(self, capacity: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.cache = BlockCache(capacity)
        self._clock = clock
        self._data: dict[bytes, bytes] = {}
        self.lookups = 0
        self.hits = 0

    def lookup(self, keys: Sequence[bytes], holder: str, *, ttl: float) -> int:
        """Pins the longest sealed prefix of the chain ``keys`` for ``holder``; its length."""
        found = self.cache.lookup(keys, holder, now=self._clock(), ttl=ttl)
        self.lookups += len(keys)
        self.hits += found
        return found

    def reserve(self, places: Iterable[Place], holder: str, *, ttl: float) -> list[int]:
        """A lease for each place, parents first; 0 where there is none to have."""
        leases = []
        for place in places:
            reserved = self.cache.reserve(place.key, place.parent, place.size, holder, now=self._clock(), ttl=ttl)
            self._drop(reserved.dropped)
            leases.append(reserved.lease)
        return leases

    async def put(self, key: bytes, lease: int, block: Stored) -> bool:
        """Keeps and seals a block; False when its lease does not hold or its parent is not sealed.

        Raises:
            InvalidArgument: reason SIZE_MISMATCH: not the size that was reserved.
            DataLoss: reason CHECKSUM_MISMATCH: the bytes are not those that were sent.
        """
        size = self.cache.reserved(key, lease, now=self._clock())
        if size is None:
            return False
        if len(block.data) != size:
            text = f"block {key.hex()} has {len(block.data)} bytes, reserved were {size}"
            raise InvalidArgument(text, reason="SIZE_MISMATCH", key=key.hex())
        # Off the loop: a large block takes milliseconds.
        if await asyncio.to_thread(_digest, block.data) != block.checksum:
            text = f"the bytes of block {key.hex()} do not have the checksum that came with them"
            raise DataLoss(text, reason="CHECKSUM_MISMATCH", help="send the block again", key=key.hex())
        if not self.cache.seal(key, lease, block.checksum, now=self._clock()):
            return False
        self._data[key] = block.data
        return True

    def get(self, key: bytes, holder: str) -> Stored:
        """A block that ``holder`` has pinned.

        Raises:
            FailedPrecondition: reason NOT_PINNED.
        """
        try:
            checksum = self.cache.checksum(key, holder, now=self._clock())
        except NotPinned as error:
            raise FailedPrecondition(
                f"{holder} has no pin on block {key.hex()}",
                reason="NOT_PINNED",
                help="look the block up first, and read it before the pin lapses",
                key=key.hex(),
            ) from error
        return Stored(checksum, self._data[key])

    def release(self, holder: str, keys: Iterable[bytes]) -> None:
        """Ends the holder's pins and leases on ``keys``, or all of them."""
        self._drop(self.cache.release(holder, keys))

    def expire(self) -> None:
        """Ends what has lapsed."""
        self._drop(self.cache.expire(self._clock()))

    def check_integrity(self) -> None:
        """Compares the bytes with the books.

        Raises:
            CacheCorrupt: the books do not agree with themselves.
            DataLoss: reason BLOCK_LOST: a block's bytes are missing, of another size, or kept after the block.
        """
        self.cache.check_integrity()
        sizes = {block.key: block.size for block in self.cache.sealed()}
        if sizes != {key: len(data) for key, data in self._data.items()}:
            raise DataLoss("the blocks' bytes are not those in the books", reason="BLOCK_LOST")

    def _drop(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._data.pop(key, None)  # a block that was being written has none


def _digest(data: bytes) -> bytes:
    return sha256(data).digest()
