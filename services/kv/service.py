"""The kv service: checks what comes in, then asks the store. Everything a caller can make grow has a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from hashlib import sha256

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.kv.disk import Disk
from countersign.services.kv.metering import observe_store
from countersign.services.kv.mover import in_ram
from countersign.services.kv.peers import Peers
from countersign.services.kv.store import POLICIES, BlockStore, Place
from countersign.services.protocol.cache import Block, Copy, Found, Outcome, Reserved, Tier
from countersign.services.protocol.checksum import CHECKSUM_BYTES
from countersign.services.protocol.keys import KEY_BYTES
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from countersign.services.runtime.service import Call, Context
from countersign.services.runtime.shared_memory import MemoryServer
from countersign.v1 import kv_pb2
from countersign.v1.kv_pb2 import (
    GetRequest,
    GetResponse,
    GetStatsRequest,
    GetStatsResponse,
    Grant,
    LookupRequest,
    LookupResponse,
    PutPart,
    PutRequest,
    PutResponse,
    ReleaseRequest,
    ReleaseResponse,
    ReserveOutcome,
    ReserveRequest,
    ReserveResponse,
    Run,
    Staged,
    TierStats,
)
from countersign.v1.registry_pb2 import Instance

MAX_BLOCKS = 8192  # of one call: 131,072 tokens
MAX_BLOCK_BYTES = 32 << 20
MAX_PARTS = 1 << 20  # of one Put
MAX_PART_BYTES = 32 << 20  # fits a gRPC message with room to spare
MESSAGE_BYTES = 1 << 20  # of small parts together
# Copied or hashed in one go; then others get their turn.
TURN_BYTES = 1 << 20
MAX_TTL_MS = 600_000
MAX_HOLDER_CHARACTERS = 200
MAX_FORMAT_CHARACTERS = 200
MAX_PINS = 65_536
EXPIRY_PERIOD_S = 1.0

_OUTCOMES = {
    Outcome.GRANTED: ReserveOutcome.RESERVE_OUTCOME_GRANTED,
    Outcome.PRESENT: ReserveOutcome.RESERVE_OUTCOME_PRESENT,
    Outcome.BUSY: ReserveOutcome.RESERVE_OUTCOME_BUSY,
    Outcome.NO_PARENT: ReserveOutcome.RESERVE_OUTCOME_NO_PARENT,
    Outcome.FOREIGN: ReserveOutcome.RESERVE_OUTCOME_FOREIGN,
    Outcome.NO_ROOM: ReserveOutcome.RESERVE_OUTCOME_NO_ROOM,
}


class KvService:
    """Handlers over a ``BlockStore``.

    ``address`` gives the host:port where Put and Get are served, ``memory`` hands out the arena on this host, ``peers``
    knows other stores.
    """

    descriptor: ServiceDescriptor = kv_pb2.DESCRIPTOR.services_by_name["KvService"]

    def __init__(
        self,
        store: BlockStore,
        address: Callable[[], str],
        memory: MemoryServer | None = None,
        peers: Peers | None = None,
    ) -> None:
        self._store = store
        self._address = address
        self._memory = memory
        self._peers = peers

    async def run(self) -> None:
        """Ends what has lapsed, once a second, and writes to disk what is new."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._store.run())
            tasks.create_task(self._expire())

    async def close(self) -> None:
        """What is in RAM only goes with the process: it is a cache."""
        if self._memory is not None:
            await self._memory.stop()
        if self._peers is not None:
            await self._peers.close()
        await self._store.close()

    def describe(self, instance: Instance) -> None:
        """A store has nothing to add."""

    async def Lookup(self, request: LookupRequest, call: Call) -> LookupResponse:
        """Raises InvalidArgument, ResourceExhausted (reason TOO_MANY_PINS)."""
        ttl, keys, holder = _ttl(request.ttl_ms), _keys(request.keys), _holder(request.holder)
        if self._store.cache.pins >= MAX_PINS:
            text = f"{MAX_PINS} look-ups are pinned already"
            raise ResourceExhausted(text, reason="TOO_MANY_PINS", help="release pins, or let them lapse")
        found = self._store.lookup(keys, holder, ttl=ttl)
        if self._peers is not None and not request.local and found.count < len(keys):
            found = await self._ask_peers(self._peers, keys, holder, ttl, found)
        self._store.counts.lookups += len(keys)
        self._store.counts.hits += found.count
        return await self._found(keys[: found.count], found.pin, request.skip)

    async def Reserve(self, request: ReserveRequest, call: Call) -> ReserveResponse:
        """Raises InvalidArgument."""
        ttl, holder, kind = _ttl(request.ttl_ms), _holder(request.holder), _kind(request.kind)
        _count(len(request.blocks))
        places = [_place(block) for block in request.blocks]
        reserved = self._store.reserve(places, request.kind.size, kind, holder, ttl=ttl)
        return ReserveResponse(
            grants=[_grant(each) for each in reserved], address=self._address(), socket=self._socket()
        )

    async def Put(self, requests: AsyncIterator[PutRequest], call: Call) -> PutResponse:
        """Takes part after part; an error leaves what is sealed by then sealed.

        Raises InvalidArgument (also reason SIZE_MISMATCH), FailedPrecondition (reasons LEASE_EXPIRED, NOT_SEALABLE,
        NO_SESSION), DataLoss (reason CHECKSUM_MISMATCH).
        """
        sealed = received = handled = 0
        async for request in requests:
            received += len(request.parts)
            if received > MAX_PARTS:
                raise InvalidArgument(f"more than {MAX_PARTS} parts in one call", help="make the parts larger")
            for part in request.parts:
                handled += self._take(part)
                sealed += bool(part.checksum)
                if handled >= TURN_BYTES:
                    await asyncio.sleep(0)
                    handled = 0
        return PutResponse(sealed=sealed)

    async def Get(self, request: GetRequest, call: Call) -> AsyncIterator[GetResponse]:
        """Raises InvalidArgument, FailedPrecondition (reason NOT_PINNED), DataLoss (reason BLOCK_DAMAGED)."""
        blocks = [self._store.block(key, request.pin) for key in _keys(request.keys)]
        part_bytes = min(request.part_bytes or MAX_PART_BYTES, MAX_PART_BYTES)
        largest = max((block.size for block in blocks), default=0)
        reply, size = GetResponse(), 0
        for start in range(0, largest, part_bytes):
            for index, block in enumerate(blocks):
                stop = min(start + part_bytes, block.size)
                if start >= stop:
                    continue
                if size and size + stop - start > MESSAGE_BYTES:
                    yield reply
                    reply, size = GetResponse(), 0
                data = await self._store.read(block, request.pin, start, stop)
                checksum = block.checksum if stop == block.size else b""
                reply.parts.add(index=index, offset=start, data=data, checksum=checksum)
                size += stop - start
        if size:
            yield reply
        self._store.counts.read += len(blocks)

    async def Release(self, request: ReleaseRequest, call: Call) -> ReleaseResponse:
        """Raises InvalidArgument."""
        _count(len(request.numbers))
        self._store.release(request.numbers)
        return ReleaseResponse()

    async def GetStats(self, request: GetStatsRequest, call: Call) -> GetStatsResponse:
        blocks = list(self._store.cache.sealed())
        counts = self._store.counts
        return GetStatsResponse(
            blocks=len(blocks),
            bytes=sum(block.size for block in blocks),
            ram=self._tier(Tier.RAM, blocks),
            disk=self._tier(Tier.DISK, blocks),
            lookups=counts.lookups,
            hits=counts.hits,
            sealed=counts.sealed,
            read=counts.read,
            from_peers=counts.from_peers,
            damaged=self._store.damaged,
        )

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            self._store.expire()

    async def _ask_peers(self, peers: Peers, keys: Sequence[bytes], holder: str, ttl: float, found: Found) -> Found:
        """Looks again when another store had more."""
        if not await peers.fetch(keys, found.count):
            return found
        more = self._store.lookup(keys, holder, ttl=ttl)
        self._store.release([found.pin])
        return more

    async def _found(self, keys: Sequence[bytes], pin: int, skip: int) -> LookupResponse:
        blocks = await self._store.bring(keys[skip:], pin) if len(keys) > skip else []
        count = min(skip, len(keys)) + len(blocks)
        return LookupResponse(
            found=count,
            address=self._address(),
            pin=pin,
            places=[self._where(block) for block in blocks],
            socket=self._socket(),
            kind=blocks[0].kind if blocks else b"",
        )

    def _where(self, block: Block) -> kv_pb2.Place:
        runs = self._store.arena.runs(block.slot) if in_ram(block) and self._memory is not None else []
        self._store.counts.read += bool(runs)
        return kv_pb2.Place(
            runs=[Run(offset=offset, length=length) for offset, length in runs], checksum=block.checksum
        )

    def _take(self, part: PutPart) -> int:
        """How many bytes were copied or hashed for it."""
        _key(part.key)
        handled = 0
        data = self._staged(part.staged) if part.HasField("staged") else part.data
        if data:
            self._store.write(part.key, part.lease, part.offset, data)
            handled += len(data)
        if part.checksum:
            _checksum(part.checksum)
            handled += self._store.seal(part.key, part.lease, part.checksum).size
        return handled

    def _staged(self, staged: Staged) -> memoryview:
        session = self._memory.session(staged.session) if self._memory is not None else None
        if session is None:
            text = "there is no such session of shared memory"
            raise FailedPrecondition(text, reason="NO_SESSION", help="connect to the store's socket, and keep it open")
        start, stop = staged.run.offset, staged.run.offset + staged.run.length
        if stop > session.memory.size or staged.run.length > MAX_BLOCK_BYTES:
            text = f"bytes {start} to {stop} are not in the memory of {session.memory.size} bytes that was handed in"
            raise InvalidArgument(text, reason="SIZE_MISMATCH")
        return session.memory.view[start:stop]

    def _tier(self, tier: Tier, blocks: Sequence[Block]) -> TierStats:
        cache = self._store.cache
        return TierStats(
            blocks=sum(block.copies[tier] is Copy.WHOLE for block in blocks),
            bytes=cache.room(tier),
            capacity_bytes=cache.capacity[tier],
            evictions=cache.evictions[tier],
        )

    def _socket(self) -> str:
        return self._memory.name if self._memory is not None else ""


async def create(context: Context) -> KvService:
    """A store of ``kv.ram_bytes``, with what the disk kept.

    Raises FailedPrecondition: its folder is taken or unusable.
    """
    config = context.config.kv
    disk = Disk(context.config.data_dir / "kv", config.disk_bytes) if config.disk_bytes else None
    store = BlockStore(config.ram_bytes, disk=disk, policy=POLICIES[config.eviction])
    restored = await store.start()
    if restored:
        context.log.info("blocks from disk", extra={"blocks": restored})
    memory = MemoryServer(context.instance, store.arena.memory, store.draw)
    memory.start()
    observe_store(store)
    peers = Peers(store, context.registry, context.instance, context.log) if config.peers else None
    return KvService(store, context.address, memory, peers)


def _count(blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise InvalidArgument(f"{blocks} blocks in one call", help=f"send at most {MAX_BLOCKS}")


def _keys(keys: Sequence[bytes]) -> Sequence[bytes]:
    _count(len(keys))
    if any(len(key) != KEY_BYTES for key in keys):
        for key in keys:
            _key(key)
    return keys


def _key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvalidArgument(f"a block key of {len(key)} bytes", help=f"a key is a SHA-256: {KEY_BYTES} bytes")


def _checksum(checksum: bytes) -> None:
    if len(checksum) != CHECKSUM_BYTES:
        text = f"a checksum of {len(checksum)} bytes"
        raise InvalidArgument(text, help=f"it is an XXH3-128: {CHECKSUM_BYTES} bytes")


def _place(block: kv_pb2.BlockId) -> Place:
    _key(block.key)
    if block.parent:
        _key(block.parent)
    if block.parent == block.key:
        raise InvalidArgument(f"block {block.key.hex()} is its own parent")
    return Place(block.key, block.parent, block.cost_us)


def _kind(kind: kv_pb2.BlockKind) -> bytes:
    """One name for all that a block's bytes depend on besides its tokens."""
    if len(kind.weights_sha256) != KEY_BYTES:
        text = f"a digest of weights of {len(kind.weights_sha256)} bytes"
        raise InvalidArgument(text, help=f"it is a SHA-256: {KEY_BYTES} bytes")
    if not 1 <= len(kind.cache_format) <= MAX_FORMAT_CHARACTERS:
        text = f"a cache format of {len(kind.cache_format)} characters"
        raise InvalidArgument(text, help=f"name it with 1 to {MAX_FORMAT_CHARACTERS} characters")
    if not 1 <= kind.size <= MAX_BLOCK_BYTES:
        text = f"a block of {kind.size} bytes"
        raise InvalidArgument(text, reason="BLOCK_SIZE", help=f"a block has 1 to {MAX_BLOCK_BYTES} bytes")
    return sha256(kind.SerializeToString(deterministic=True)).digest()


def _grant(reserved: Reserved) -> Grant:
    return Grant(lease=reserved.lease, outcome=_OUTCOMES[reserved.outcome])


def _holder(holder: str) -> str:
    if not 1 <= len(holder) <= MAX_HOLDER_CHARACTERS:
        text = f"a holder's name of {len(holder)} characters"
        raise InvalidArgument(text, help=f"name the reader or writer with 1 to {MAX_HOLDER_CHARACTERS} characters")
    return holder


def _ttl(ttl_ms: int) -> float:
    """Seconds."""
    if not 1 <= ttl_ms <= MAX_TTL_MS:
        raise InvalidArgument(f"ttl_ms is {ttl_ms}", help=f"it is 1 to {MAX_TTL_MS}")
    return ttl_ms / 1000
