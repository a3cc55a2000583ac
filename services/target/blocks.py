"""The bytes of KV blocks between a target and one store: through shared memory on one host, by gRPC else."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence

from countersign.services.protocol.checksum import checksum
from countersign.services.runtime.errors import CountersignError, DataLoss
from countersign.services.runtime.extents import Extents
from countersign.services.runtime.rpc import Channel
from countersign.services.runtime.shared_memory import Memory, MemoryClient
from countersign.v1.kv_pb2 import GetRequest, GetResponse, LookupResponse, PutPart, PutRequest, PutResponse, Run, Staged

DATA_TIMEOUT_S = 10.0
# Memory for what is being put; pages of it that were never used take no room.
STAGING_BYTES = 256 << 20
PAGE = 4096
_CONNECT_S = 0.2
_SERVICE = "/countersign.v1.KvService"


class Staging:
    """This target's own memory, which stores on this host read from: room for each put while it lasts."""

    def __init__(self, size: int = STAGING_BYTES) -> None:
        self.memory = Memory("countersign-put", size)
        self._free = Extents(size // PAGE)

    def take(self, size: int) -> int | None:
        """First byte of ``size`` bytes in one run; None when there are none."""
        count = -(-size // PAGE)
        if count > self._free.free:
            return None
        extents = self._free.take(count)
        if len(extents) > 1:
            self._free.give(extents)
            return None
        return extents[0][0] * PAGE

    def give(self, start: int, size: int) -> None:
        self._free.give([(start // PAGE, -(-size // PAGE))])

    def close(self) -> None:
        self.memory.close()


class StoreLink:
    """One store, by its address and the name of its socket. Every call raises what `Channel` does."""

    def __init__(self, address: str, socket: str, staging: Staging | None, log: logging.Logger) -> None:
        self._channel = Channel(address, bulk=True)
        self._socket = socket
        self._staging = staging
        self._log = log
        self._memory: MemoryClient | None = None
        self._connecting = asyncio.Lock()
        self._apart = not socket or staging is None
        self.shared = 0  # blocks that came through shared memory, and by gRPC
        self.sent = 0

    @property
    def dead(self) -> bool:
        """The store ended the session, as its death does."""
        return self._memory is not None and not self._memory.alive

    async def memory(self) -> MemoryClient | None:
        """The store's memory; None when it is not on this host. Asked once, and again after the store ended it."""
        async with self._connecting:
            if self.dead:
                self.let_go()
            if self._memory is None and not self._apart and self._staging is not None:
                try:
                    self._memory = await MemoryClient.connect(self._socket, self._staging.memory, _CONNECT_S)
                except CountersignError as error:
                    self._apart = True
                    self._log.info("blocks go by gRPC", extra={"store": self._socket, "error": str(error)})
            return self._memory

    async def read(self, keys: Sequence[bytes], found: LookupResponse) -> list[bytes]:
        """The blocks of ``keys`` that ``found`` has places for, up to the first that is damaged."""
        memory = await self.memory() if any(place.runs for place in found.places) else None
        blocks: list[bytes] = []
        if memory is not None:
            blocks = await asyncio.to_thread(_copy_all, memory.theirs.view, found)
            self.shared += len(blocks)
        if len(blocks) < len(keys):
            blocks += await self._get(keys[len(blocks) :], found.pin)
        return blocks

    async def put(self, parts: AsyncIterator[PutRequest]) -> int:
        """Sends parts; the number of blocks sealed."""
        reply = await self._channel.put_stream(f"{_SERVICE}/Put", parts, PutResponse, timeout=DATA_TIMEOUT_S)
        return reply.sealed

    def let_go(self) -> None:
        """Keeps nothing of the store's memory."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    async def close(self) -> None:
        self.let_go()
        await self._channel.close()

    async def _get(self, keys: Sequence[bytes], pin: int) -> list[bytes]:
        request = GetRequest(keys=keys, pin=pin)
        blocks: list[bytes] = []
        parts: list[bytes] = []
        try:
            async for reply in self._channel.stream(f"{_SERVICE}/Get", request, GetResponse, timeout=DATA_TIMEOUT_S):
                for part in reply.parts:
                    parts.append(part.data)
                    if not part.checksum:
                        continue
                    if part.index != len(blocks) or checksum(parts) != part.checksum:
                        raise DataLoss("a block came damaged", reason="CHECKSUM_MISMATCH")
                    blocks.append(parts[0] if len(parts) == 1 else b"".join(parts))
                    parts = []
        except CountersignError as error:
            if error.reason not in {"CHECKSUM_MISMATCH", "BLOCK_DAMAGED", "NOT_PINNED"}:
                raise
            self._log.warning("a stored block is of no use, computing from there", extra={"error": str(error)})
        self.sent += len(blocks)
        return blocks


def _copy_all(view: memoryview, found: LookupResponse) -> list[bytes]:
    """Copies out of the arena, each compared with its checksum afterwards: until then its room may become another's.

    What was let go meanwhile gives no more.
    """
    blocks: list[bytes] = []
    for place in found.places:
        try:
            data = b"".join(view[run.offset : run.offset + run.length] for run in place.runs)
        except ValueError:
            break
        if not data or checksum([data]) != place.checksum:
            break
        blocks.append(data)
    return blocks


def staged(session: int, start: int, length: int) -> Staged:
    """Where bytes lie in this target's memory."""
    return Staged(session=session, run=Run(offset=start, length=length))


def seal_of(key: bytes, lease: int, digest: bytes) -> PutPart:
    """Says that a block is whole."""
    return PutPart(key=key, lease=lease, checksum=digest)
