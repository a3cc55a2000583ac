"""The kv service over gRPC: what a target stores it finds again, whole, and nobody else's limits are its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field

import pytest
import pytest_asyncio
from kv_client import KIND, SIZE, Kv, block, data_of

from countersign.services.kv import service
from countersign.services.kv.service import MAX_BLOCK_BYTES, MAX_BLOCKS, MAX_TTL_MS, KvService
from countersign.services.kv.store import BlockStore, Place
from countersign.services.protocol.cache import Recency, Tier
from countersign.services.protocol.checksum import checksum
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.errors import CountersignError, DataLoss, FailedPrecondition, InvalidArgument
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.v1.kv_pb2 import BlockId, BlockKind, PutPart, ReserveOutcome, Run, Staged

KEYS = chain_keys(root_key(b"w" * 32, "fp32", "tenant"), range(16 * 6))


@dataclass
class Served(Kv):
    """With the store itself."""

    store: BlockStore = field(kw_only=True)


@pytest_asyncio.fixture
async def kv() -> AsyncIterator[Served]:
    store = BlockStore(4 * SIZE, policy=Recency, clock=lambda: client.now)
    server = RpcServer("127.0.0.1:0")
    served = KvService(store, lambda: "here:1")
    server.add(served)
    client = Served(Channel(await server.start()), store=store)
    yield client
    await client.channel.close()
    await server.stop(0)
    store.check_integrity()
    await served.close()


async def refused(call: Awaitable[object]) -> CountersignError:
    with pytest.raises(CountersignError) as refusal:
        await call
    return refusal.value


async def test_blocks_come_back_as_they_were_put(kv: Served) -> None:
    assert await kv.store_chain(KEYS[:3]) == 3
    found = await kv.look(KEYS)
    assert found.found == 3
    assert await kv.get(KEYS[:3], found.pin) == [data_of(key) for key in KEYS[:3]]


async def test_a_block_may_come_in_parts_and_is_found_once_its_checksum_has_come(kv: Served) -> None:
    (lease,) = await kv.reserve(KEYS[:1])
    data = data_of(KEYS[0])
    for start in (3000, 0):
        stop = SIZE if start else 3000
        assert await kv.put(PutPart(key=KEYS[0], lease=lease, offset=start, data=data[start:stop])) == 0
    assert (await kv.look(KEYS)).found == 0
    assert await kv.put(PutPart(key=KEYS[0], lease=lease, checksum=checksum([data]))) == 1
    assert await kv.get(KEYS[:1], (await kv.look(KEYS)).pin) == [data]


async def test_blocks_may_be_asked_for_part_by_part_over_all_of_them(kv: Served) -> None:
    await kv.store_chain(KEYS[:2])
    parts = await kv.parts(KEYS[:2], (await kv.look(KEYS)).pin, part_bytes=SIZE // 2)
    assert [(part.index, part.offset, bool(part.checksum)) for part in parts] == [
        (0, 0, False),
        (1, 0, False),
        (0, SIZE // 2, True),
        (1, SIZE // 2, True),
    ]
    assert b"".join(part.data for part in parts if part.index == 1) == data_of(KEYS[1])


async def test_a_block_whose_bytes_do_not_match_its_checksum_is_never_found(kv: Served) -> None:
    leases = await kv.reserve(KEYS[:2])
    loss = await refused(kv.put(block(KEYS[0], leases[0]), block(KEYS[1], leases[1], digest=b"\0" * 16)))
    assert isinstance(loss, DataLoss)
    assert (loss.reason, loss.metadata["key"]) == ("CHECKSUM_MISMATCH", KEYS[1].hex())
    assert (await kv.look(KEYS)).found == 1
    assert kv.store.cache.room(Tier.RAM) == SIZE, "its room is free at once"


@pytest.mark.parametrize("offset", [SIZE - 10, SIZE, 2**60])
async def test_bytes_outside_of_what_was_reserved_are_refused(kv: Served, offset: int) -> None:
    (lease,) = await kv.reserve(KEYS[:1])
    wrong = await refused(kv.put(PutPart(key=KEYS[0], lease=lease, offset=offset, data=b"x" * 11)))
    assert isinstance(wrong, InvalidArgument)
    assert wrong.reason == "SIZE_MISMATCH"


async def test_a_block_whose_parts_are_missing_is_refused(kv: Served) -> None:
    (lease,) = await kv.reserve(KEYS[:1])
    data = data_of(KEYS[0])[:-1]
    # All that came is right, and what never came happens to be what the room held.
    digest = checksum([data + b"\0"])
    wrong = await refused(kv.put(PutPart(key=KEYS[0], lease=lease, data=data, checksum=digest)))
    assert wrong.reason == "NOT_SEALABLE"
    assert (await kv.look(KEYS)).found == 0


async def test_only_a_pin_opens_a_block_and_only_while_it_lasts(kv: Served) -> None:
    await kv.store_chain(KEYS[:2])
    pin = (await kv.look(KEYS[:1], ttl_ms=500)).pin
    for keys, number in ((KEYS[:1], pin + 1), (KEYS[:1], 0), (KEYS[1:2], pin)):
        refusal = await refused(kv.get(keys, number))
        assert isinstance(refusal, FailedPrecondition)
        assert refusal.reason == "NOT_PINNED"
    assert await kv.get(KEYS[:1], pin)
    kv.now = 0.5
    assert (await refused(kv.get(KEYS[:1], pin))).reason == "NOT_PINNED"


async def test_a_full_store_gives_way_to_new_blocks_but_not_what_is_pinned(kv: Served) -> None:
    await kv.store_chain(KEYS[:2])
    other = chain_keys(root_key(b"w" * 32, "fp32", "other"), range(16 * 3))
    await kv.store_chain(other[:2])
    found = await kv.look(KEYS[:2])
    assert await kv.reserve(other, "late") == [0, 0, 0], "other[0] and [1] are there, and [1] may not go for its child"
    fresh = chain_keys(root_key(b"w" * 32, "fp32", "fresh"), range(16 * 3))
    assert [bool(lease) for lease in await kv.reserve(fresh, "late")] == [True, True, False]
    assert await kv.get(KEYS[:2], found.pin) == [data_of(key) for key in KEYS[:2]]
    assert (await kv.stats()).ram.evictions == 2


async def test_a_dead_writers_lease_lapses_and_another_may_write(kv: Served) -> None:
    (lapsed,) = await kv.reserve(KEYS[:1], "dead", ttl_ms=500)
    assert await kv.reserve(KEYS[:1], "alive") == [0]
    kv.now = 0.5
    assert (await refused(kv.put(block(KEYS[0], lapsed, data=b"x" * SIZE)))).reason == "LEASE_EXPIRED"
    assert await kv.store_chain(KEYS[:1], "alive") == 1
    assert (await refused(kv.put(block(KEYS[0], lapsed, data=b"x" * SIZE)))).reason == "LEASE_EXPIRED"
    assert await kv.get(KEYS[:1], (await kv.look(KEYS)).pin) == [data_of(KEYS[0])]


async def test_every_block_that_gets_no_lease_says_why(kv: Served) -> None:
    await kv.store_chain(KEYS[:1])
    await kv.reserve(KEYS[1:2], "other", parent=KEYS[0])
    foreign = BlockKind(weights_sha256=b"v" * 32, cache_format="fp32", size=SIZE)
    wide = BlockKind(weights_sha256=b"w" * 32, cache_format="fp32", size=2 * SIZE)
    for name, key, parent, kind in (
        ("PRESENT", KEYS[0], b"", KIND),
        ("BUSY", KEYS[1], KEYS[0], KIND),
        ("NO_PARENT", KEYS[3], KEYS[2], KIND),
        ("NO_PARENT", KEYS[2], KEYS[1], KIND),
        ("FOREIGN", KEYS[2], KEYS[0], foreign),
        ("FOREIGN", KEYS[2], KEYS[0], wide),
        ("NO_ROOM", KEYS[5], b"", BlockKind(weights_sha256=b"w" * 32, cache_format="fp32", size=5 * SIZE)),
    ):
        (grant,) = await kv.grants([BlockId(key=key, parent=parent)], kind=kind)
        assert (ReserveOutcome.Name(grant.outcome), grant.lease) == (f"RESERVE_OUTCOME_{name}", 0)


async def test_released_pins_and_leases_are_gone(kv: Served) -> None:
    await kv.store_chain(KEYS[:1])
    pin = (await kv.look(KEYS)).pin
    await kv.release(pin, pin, 12345)
    assert (await refused(kv.get(KEYS[:1], pin))).reason == "NOT_PINNED"
    leases = await kv.reserve(KEYS[1:3], parent=KEYS[0])
    await kv.release(*leases)
    assert kv.store.cache.room(Tier.RAM) == SIZE


async def test_the_store_counts_what_it_did(kv: Served) -> None:
    await kv.store_chain(KEYS[:3])
    await kv.get(KEYS[:3], (await kv.look(KEYS)).pin)
    stats = await kv.stats()
    assert (stats.blocks, stats.bytes, stats.ram.bytes, stats.ram.capacity_bytes) == (3, 3 * SIZE, 3 * SIZE, 4 * SIZE)
    assert (stats.lookups, stats.hits, stats.sealed, stats.read) == (6, 3, 3, 3)


BAD: list[tuple[str, Callable[[Kv], Awaitable[object]]]] = [
    ("a short key", lambda kv: kv.look([b"short"])),
    ("too many keys", lambda kv: kv.look([KEYS[0]] * (MAX_BLOCKS + 1))),
    ("a pin without end", lambda kv: kv.look(KEYS, ttl_ms=MAX_TTL_MS + 1)),
    ("a pin without time", lambda kv: kv.look(KEYS, ttl_ms=0)),
    ("a reader without a name", lambda kv: kv.look(KEYS, holder="")),
    ("a name that is a book", lambda kv: kv.look(KEYS, holder="x" * 1000)),
    ("a block without bytes", lambda kv: kv.grants([BlockId(key=KEYS[0])], kind=kind(size=0))),
    ("a huge block", lambda kv: kv.grants([BlockId(key=KEYS[0])], kind=kind(size=MAX_BLOCK_BYTES + 1))),
    ("a digest that is none", lambda kv: kv.grants([BlockId(key=KEYS[0])], kind=kind(weights=b"w"))),
    ("a format without a name", lambda kv: kv.grants([BlockId(key=KEYS[0])], kind=kind(cache_format=""))),
    ("a short parent", lambda kv: kv.grants([BlockId(key=KEYS[0], parent=b"p")])),
    ("its own parent", lambda kv: kv.grants([BlockId(key=KEYS[0], parent=KEYS[0])])),
    ("too many blocks", lambda kv: kv.reserve([KEYS[0]] * (MAX_BLOCKS + 1))),
    ("a put with a short key", lambda kv: kv.put(PutPart(key=b"short"))),
    ("a get with a short key", lambda kv: kv.get([b"short"], 1)),
    ("too many releases", lambda kv: kv.release(*[1] * (MAX_BLOCKS + 1))),
]


def kind(weights: bytes = b"w" * 32, cache_format: str = "fp32", size: int = SIZE) -> BlockKind:
    return BlockKind(weights_sha256=weights, cache_format=cache_format, size=size)


@pytest.mark.parametrize("call", [row[1] for row in BAD], ids=[row[0] for row in BAD])
async def test_what_cannot_be_is_refused_with_a_typed_error(
    kv: Served, call: Callable[[Kv], Awaitable[object]]
) -> None:
    assert isinstance(await refused(call(kv)), InvalidArgument)
    assert kv.store.cache.room(Tier.RAM) == 0


async def test_a_checksum_of_another_kind_is_refused(kv: Served) -> None:
    (lease,) = await kv.reserve(KEYS[:1])
    assert isinstance(await refused(kv.put(block(KEYS[0], lease, digest=b"\0" * 32))), InvalidArgument)


async def test_staged_bytes_need_a_session(kv: Served) -> None:
    (lease,) = await kv.reserve(KEYS[:1])
    part = PutPart(key=KEYS[0], lease=lease, staged=Staged(session=7, run=Run(offset=0, length=SIZE)))
    assert (await refused(kv.put(part))).reason == "NO_SESSION"


async def test_pins_are_bounded(kv: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "MAX_PINS", 1)
    await kv.store_chain(KEYS[:1])
    await kv.look(KEYS)
    assert (await refused(kv.look(KEYS))).reason == "TOO_MANY_PINS"


async def test_what_lapsed_is_reclaimed_without_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "EXPIRY_PERIOD_S", 0.005)
    times, swept = [0.0], asyncio.Event()

    class Noticing(BlockStore):
        def expire(self) -> None:
            super().expire()
            swept.set()

    store = Noticing(4 * SIZE, clock=lambda: times[-1])
    (reserved,) = store.reserve([Place(KEYS[0], b"")], SIZE, b"kind", "dead", ttl=1)
    assert reserved.lease
    times.append(1.0)
    running = asyncio.create_task(KvService(store, lambda: "here:1").run())
    await asyncio.wait_for(swept.wait(), 10)
    running.cancel()
    assert store.cache.room(Tier.RAM) == 0
    await store.close()
