"""The kv service: checks what comes in, then asks the store. Everything a caller can make grow has a bound."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.kv.store import BlockStore, Place, Stored
from countersign.services.protocol.keys import KEY_BYTES
from countersign.services.runtime.errors import InvalidArgument
from countersign.services.runtime.service import Call, Context
from countersign.v1 import kv_pb2
from countersign.v1.kv_pb2 import (
    GetRequest,
    GetResponse,
    GetStatsRequest,
    GetStatsResponse,
    LookupRequest,
    LookupResponse,
    PutRequest,
    PutResponse,
    ReleaseRequest,
    ReleaseResponse,
    ReserveRequest,
    ReserveResponse,
)
from countersign.v1.registry_pb2 import Instance

MAX_BLOCKS = 8192  # of one call: 131,072 tokens
MAX_BLOCK_BYTES = 32 << 20  # fits a gRPC message with room to spare
MAX_TTL_MS = 600_000
MAX_HOLDER_CHARACTERS = 200
EXPIRY_PERIOD_S = 1.0


class KvService:
    """Handlers over a ``BlockStore``; ``address`` gives the host:port where Put and Get are served."""

    descriptor: ServiceDescriptor = kv_pb2.DESCRIPTOR.services_by_name["KvService"]

    def __init__(self, store: BlockStore, address: Callable[[], str]) -> None:
        self._store = store
        self._address = address

    async def run(self) -> None:
        """Ends what has lapsed, once a second."""
        while True:
            await asyncio.sleep(EXPIRY_PERIOD_S)
            self._store.expire()

    async def close(self) -> None:
        """The blocks go with the process: they are a cache."""

    def describe(self, instance: Instance) -> None:
        """A store has nothing to add."""

    async def Lookup(self, request: LookupRequest, call: Call) -> LookupResponse:
        """Raises InvalidArgument."""
        ttl = _ttl(request.ttl_ms)
        found = self._store.lookup(_keys(request.keys), _holder(request.holder), ttl=ttl)
        return LookupResponse(found=found, address=self._address())

    async def Reserve(self, request: ReserveRequest, call: Call) -> ReserveResponse:
        """Raises InvalidArgument."""
        ttl, holder = _ttl(request.ttl_ms), _holder(request.holder)
        _count(len(request.blocks))
        places = [_place(block) for block in request.blocks]
        leases = self._store.reserve(places, holder, ttl=ttl)
        return ReserveResponse(leases=leases, address=self._address())

    async def Put(self, requests: AsyncIterator[PutRequest], call: Call) -> PutResponse:
        """Seals block after block, parents first; an error leaves those before it sealed.

        Raises InvalidArgument (also reason SIZE_MISMATCH), DataLoss (reason CHECKSUM_MISMATCH).
        """
        sealed = received = 0
        async for request in requests:
            received += 1
            _count(received)
            _key(request.key)
            block = Stored(request.checksum, request.data)
            sealed += await self._store.put(request.key, request.lease, block)
        return PutResponse(sealed=sealed)

    async def Get(self, request: GetRequest, call: Call) -> AsyncIterator[GetResponse]:
        """Raises InvalidArgument, and FailedPrecondition (reason NOT_PINNED) at the first block without a pin."""
        holder = _holder(request.holder)
        for key in _keys(request.keys):
            block = self._store.get(key, holder)
            yield GetResponse(key=key, checksum=block.checksum, data=block.data)

    async def Release(self, request: ReleaseRequest, call: Call) -> ReleaseResponse:
        """Raises InvalidArgument."""
        self._store.release(_holder(request.holder), _keys(request.keys))
        return ReleaseResponse()

    async def GetStats(self, request: GetStatsRequest, call: Call) -> GetStatsResponse:
        sizes = [block.size for block in self._store.cache.sealed()]
        return GetStatsResponse(
            blocks=len(sizes),
            bytes=sum(sizes),
            capacity_bytes=self._store.cache.capacity,
            lookups=self._store.lookups,
            hits=self._store.hits,
            evictions=self._store.cache.evictions,
        )


async def create(context: Context) -> KvService:
    """An empty store of ``kv.capacity_bytes``."""
    return KvService(BlockStore(context.config.kv.capacity_bytes), context.address)


def _count(blocks: int) -> None:
    if blocks > MAX_BLOCKS:
        raise InvalidArgument(f"{blocks} blocks in one call", help=f"send at most {MAX_BLOCKS}")


def _keys(keys: Sequence[bytes]) -> Sequence[bytes]:
    _count(len(keys))
    for key in keys:
        _key(key)
    return keys


def _key(key: bytes) -> None:
    if len(key) != KEY_BYTES:
        raise InvalidArgument(f"a block key of {len(key)} bytes", help=f"a key is a SHA-256: {KEY_BYTES} bytes")


def _place(block: kv_pb2.BlockId) -> Place:
    _key(block.key)
    if block.parent:
        _key(block.parent)
    if block.parent == block.key:
        raise InvalidArgument(f"block {block.key.hex()} is its own parent")
    if not 1 <= block.size <= MAX_BLOCK_BYTES:
        raise InvalidArgument(f"a block of {block.size} bytes", help=f"a block has 1 to {MAX_BLOCK_BYTES} bytes")
    return Place(block.key, block.parent, block.size)


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
