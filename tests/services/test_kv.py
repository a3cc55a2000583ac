"""The kv service over gRPC: what a target stores it finds again, whole, and nobody else's limits are its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256

import pytest
import pytest_asyncio

from countersign.services.kv import service
from countersign.services.kv.service import MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_TTL_MS, KvService
from countersign.services.kv.store import BlockStore, Place
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.errors import CountersignError, DataLoss, FailedPrecondition, InvalidArgument
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.v1.kv_pb2 import (
    BlockId,
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

SIZE = 1000
KEYS = chain_keys(root_key(b"w" * 32, "fp32", "tenant"), range(16 * 6))


def data_of(key: bytes) -> bytes:
    return (key * SIZE)[:SIZE]


@dataclass
class Kv:
    """A client of a served store whose clock stands still until it is moved."""

    channel: Channel
    store: BlockStore
    now: float = 0.0

    async def lookup(self, keys: Sequence[bytes], holder: str = "reader", ttl_ms: int = 1000) -> int:
        request = LookupRequest(keys=keys, holder=holder, ttl_ms=ttl_ms)
        return (await self.channel.unary("/countersign.v1.KvService/Lookup", request, LookupResponse, 10)).found

    async def reserve(self, keys: Sequence[bytes], holder: str = "writer", ttl_ms: int = 1000) -> list[int]:
        blocks = [
            BlockId(key=key, parent=parent, size=SIZE) for key, parent in zip(keys, (b"", *keys[:-1]), strict=True)
        ]
        return await self.reserve_blocks(blocks, holder, ttl_ms)

    async def reserve_blocks(self, blocks: Sequence[BlockId], holder: str = "writer", ttl_ms: int = 1000) -> list[int]:
        request = ReserveRequest(blocks=blocks, holder=holder, ttl_ms=ttl_ms)
        reply = await self.channel.unary("/countersign.v1.KvService/Reserve", request, ReserveResponse, 10)
        return list(reply.leases)

    async def put(self, *requests: PutRequest) -> int:
        async def stream() -> AsyncIterator[PutRequest]:
            for request in requests:
                yield request

        return (await self.channel.put_stream("/countersign.v1.KvService/Put", stream(), PutResponse, 10)).sealed

    async def store_chain(self, keys: Sequence[bytes], holder: str = "writer") -> int:
        leases = await self.reserve(keys, holder)
        return await self.put(*(block(key, lease) for key, lease in zip(keys, leases, strict=True)))

    async def get(self, keys: Sequence[bytes], holder: str = "reader") -> list[GetResponse]:
        request = GetRequest(keys=keys, holder=holder)
        return [reply async for reply in self.channel.stream("/countersign.v1.KvService/Get", request, GetResponse, 10)]

    async def release(self, holder: str, keys: Sequence[bytes] = ()) -> None:
        request = ReleaseRequest(holder=holder, keys=keys)
        await self.channel.unary("/countersign.v1.KvService/Release", request, ReleaseResponse, 10)

    async def stats(self) -> GetStatsResponse:
        return await self.channel.unary("/countersign.v1.KvService/GetStats", GetStatsRequest(), GetStatsResponse, 10)


def block(key: bytes, lease: int, data: bytes | None = None, checksum: bytes | None = None) -> PutRequest:
    data = data_of(key) if data is None else data
    return PutRequest(key=key, lease=lease, data=data, checksum=checksum or sha256(data).digest())


@pytest_asyncio.fixture
async def kv() -> AsyncIterator[Kv]:
    store = BlockStore(4 * SIZE, clock=lambda: client.now)
    server = RpcServer("127.0.0.1:0")
    server.add(KvService(store, lambda: "here:1"))
    client = Kv(Channel(await server.start()), store)
    yield client
    await client.channel.close()
    await server.stop(0)
    store.check_integrity()


async def test_blocks_come_back_as_they_were_put(kv: Kv) -> None:
    assert await kv.store_chain(KEYS[:3]) == 3
    assert await kv.lookup(KEYS) == 3
    replies = await kv.get(KEYS[:3])
    assert [reply.key for reply in replies] == KEYS[:3]
    assert [reply.data for reply in replies] == [data_of(key) for key in KEYS[:3]]
    assert all(sha256(reply.data).digest() == reply.checksum for reply in replies)


async def test_a_block_whose_bytes_do_not_match_its_checksum_is_never_found(kv: Kv) -> None:
    leases = await kv.reserve(KEYS[:2])
    with pytest.raises(DataLoss) as loss:
        await kv.put(block(KEYS[0], leases[0]), block(KEYS[1], leases[1], checksum=b"\0" * 32))
    assert (loss.value.reason, loss.value.metadata["key"]) == ("CHECKSUM_MISMATCH", KEYS[1].hex())
    assert await kv.lookup(KEYS) == 1


async def test_a_block_of_another_size_than_reserved_is_refused(kv: Kv) -> None:
    leases = await kv.reserve(KEYS[:1])
    with pytest.raises(InvalidArgument) as wrong:
        await kv.put(block(KEYS[0], leases[0], data=b"short"))
    assert wrong.value.reason == "SIZE_MISMATCH"
    assert await kv.lookup(KEYS) == 0


async def test_only_the_holder_of_a_pin_reads_and_only_while_it_lasts(kv: Kv) -> None:
    await kv.store_chain(KEYS[:2])
    assert await kv.lookup(KEYS[:1], "reader", ttl_ms=500) == 1
    for keys, holder in ((KEYS[:1], "another"), (KEYS[1:2], "reader")):
        with pytest.raises(FailedPrecondition) as refusal:
            await kv.get(keys, holder)
        assert refusal.value.reason == "NOT_PINNED"
    kv.now = 0.5
    with pytest.raises(FailedPrecondition):
        await kv.get(KEYS[:1], "reader")


async def test_a_full_store_gives_way_to_new_blocks_but_not_what_is_pinned(kv: Kv) -> None:
    await kv.store_chain(KEYS[:2])
    other = chain_keys(root_key(b"w" * 32, "fp32", "other"), range(16 * 3))
    await kv.store_chain(other[:2])
    assert await kv.lookup(KEYS[:2]) == 2
    leases = await kv.reserve(other, "late")
    assert leases == [0, 0, 0], "other[0] and [1] are there, and [1] may not go for its own child"
    fresh = chain_keys(root_key(b"w" * 32, "fp32", "fresh"), range(16 * 3))
    assert [bool(lease) for lease in await kv.reserve(fresh, "late")] == [True, True, False]
    assert [reply.data for reply in await kv.get(KEYS[:2])] == [data_of(key) for key in KEYS[:2]]
    assert (await kv.stats()).evictions == 2


async def test_a_dead_writers_lease_lapses_and_another_may_write(kv: Kv) -> None:
    (lapsed,) = await kv.reserve(KEYS[:1], "dead", ttl_ms=500)
    assert await kv.reserve(KEYS[:1], "alive") == [0]
    kv.now = 0.5
    assert await kv.store_chain(KEYS[:1], "alive") == 1
    assert await kv.put(block(KEYS[0], lapsed, data=b"x" * SIZE)) == 0
    assert await kv.lookup(KEYS) == 1
    assert (await kv.get(KEYS[:1]))[0].data == data_of(KEYS[0])


async def test_released_pins_and_leases_are_gone(kv: Kv) -> None:
    await kv.store_chain(KEYS[:1])
    await kv.lookup(KEYS)
    await kv.release("reader", KEYS[:1])
    with pytest.raises(FailedPrecondition):
        await kv.get(KEYS[:1])
    await kv.reserve(KEYS[:3], "writer")
    await kv.release("writer")
    assert kv.store.cache.used_bytes == SIZE


async def test_the_store_counts_what_it_did(kv: Kv) -> None:
    await kv.store_chain(KEYS[:3])
    await kv.lookup(KEYS)
    expected = GetStatsResponse(blocks=3, bytes=3 * SIZE, capacity_bytes=4 * SIZE, lookups=6, hits=3)
    assert await kv.stats() == expected


BAD: list[tuple[str, Callable[[Kv], Awaitable[object]]]] = [
    ("a short key", lambda kv: kv.lookup([b"short"])),
    ("too many keys", lambda kv: kv.lookup([KEYS[0]] * (MAX_BLOCKS + 1))),
    ("a pin without end", lambda kv: kv.lookup(KEYS, ttl_ms=MAX_TTL_MS + 1)),
    ("a pin without time", lambda kv: kv.lookup(KEYS, ttl_ms=0)),
    ("a reader without a name", lambda kv: kv.lookup(KEYS, "")),
    ("a name that is a book", lambda kv: kv.lookup(KEYS, "x" * 1000)),
    ("a block without bytes", lambda kv: kv.reserve_blocks([BlockId(key=KEYS[0])])),
    ("a huge block", lambda kv: kv.reserve_blocks([BlockId(key=KEYS[0], size=MAX_BLOCK_BYTES + 1)])),
    ("a short parent", lambda kv: kv.reserve_blocks([BlockId(key=KEYS[0], parent=b"p", size=1)])),
    ("its own parent", lambda kv: kv.reserve_blocks([BlockId(key=KEYS[0], parent=KEYS[0], size=1)])),
    ("too many blocks", lambda kv: kv.reserve([KEYS[0]] * (MAX_BLOCKS + 1))),
    ("a put with a short key", lambda kv: kv.put(PutRequest(key=b"short"))),
    ("a get with a short key", lambda kv: kv.get([b"short"])),
    ("a release by nobody", lambda kv: kv.release("")),
]


@pytest.mark.parametrize("call", [row[1] for row in BAD], ids=[row[0] for row in BAD])
async def test_what_cannot_be_is_refused_with_a_typed_error(kv: Kv, call: Callable[[Kv], Awaitable[object]]) -> None:
    with pytest.raises(CountersignError) as refusal:
        await call(kv)
    assert isinstance(refusal.value, InvalidArgument)
    assert kv.store.cache.used_bytes == 0


async def test_what_lapsed_is_reclaimed_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "EXPIRY_PERIOD_S", 0.005)
    times, swept = [0.0], asyncio.Event()

    class Noticing(BlockStore):
        def expire(self) -> None:
            super().expire()
            swept.set()

    store = Noticing(4 * SIZE, clock=lambda: times[-1])
    assert store.reserve([Place(KEYS[0], b"", SIZE)], "dead", ttl=1) == [1]
    times.append(1.0)
    running = asyncio.create_task(KvService(store, lambda: "here:1").run())
    await asyncio.wait_for(swept.wait(), 10)
    running.cancel()
    assert store.cache.used_bytes == 0
