"""A target's view of the store: what one stores another fetches, by shared memory or gRPC, and no failure raises."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
import torch
from kv_client import SIZE, GrpcBus, data_of, stored

from countersign.services.kv.service import KvService
from countersign.services.kv.store import BlockStore
from countersign.services.protocol.cache import Tier
from countersign.services.protocol.checksum import checksum
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.services.runtime.shared_memory import MemoryServer
from countersign.services.target.prefixes import Prefixes, PrefixKeys
from countersign.services.target.wire import Wire
from countersign.v1.kv_pb2 import LookupResponse

KEYS = PrefixKeys(b"w" * 32, "test")
CHAIN = KEYS("tenant", range(16 * 8))
BLOCKS = [data_of(key) for key in CHAIN]
LOG = logging.getLogger("test")


@dataclass
class House:
    kv: KvService
    store: BlockStore
    memory: MemoryServer
    bus: GrpcBus
    clients: list[Prefixes] = field(default_factory=list)

    def target(
        self, name: str = "t", *, share_memory: bool = True, size: int = SIZE, wire: Wire | None = None
    ) -> Prefixes:
        options: dict[str, Any] = {"block_bytes": size, "wire": wire, "share_memory": share_memory}
        made = Prefixes(cast("Any", self.bus), name, lambda: 0.0, LOG, keys=KEYS, **options)
        self.clients.append(made)
        return made


@pytest_asyncio.fixture
async def house() -> AsyncIterator[House]:
    store = BlockStore(16 * SIZE)
    memory = MemoryServer("kv-test", store.arena.memory, store.draw)
    memory.start()
    server = RpcServer("127.0.0.1:0")
    address = ""
    kv = KvService(store, lambda: address, memory)
    server.add(kv)
    address = await server.start()
    made = House(kv, store, memory, GrpcBus(Channel(address)))
    yield made
    for client in made.clients:
        await client.close()
    await made.bus.channel.close()
    await server.stop(0)
    store.check_integrity()
    await kv.close()


def link(prefixes: Prefixes) -> Any:
    (only,) = prefixes._links.values()
    return only


@pytest.mark.parametrize("share_memory", [True, False])
async def test_what_one_target_stores_another_fetches(house: House, share_memory: bool) -> None:
    writer, reader = house.target("a", share_memory=share_memory), house.target("b", share_memory=share_memory)
    await stored(writer, "r1", CHAIN, BLOCKS[:5])
    assert await reader.fetch("r2", CHAIN, 0) == BLOCKS[:5]
    assert await reader.fetch("r2", CHAIN, 3) == BLOCKS[3:5]
    assert await reader.fetch("r2", CHAIN, 5) == []
    assert (link(reader).shared, link(reader).sent) == ((7, 0) if share_memory else (0, 7))
    await reader._background.drain()
    assert house.store.cache.pins == 0, "each pin was given back"


@pytest.mark.parametrize("share_memory", [True, False])
async def test_blocks_may_be_put_layer_by_layer(house: House, share_memory: bool) -> None:
    writer = house.target(share_memory=share_memory)
    await stored(writer, "r1", CHAIN, BLOCKS[:1])
    async with writer.putting("r1", CHAIN, 1, 3) as put:
        assert put.wanted == [0, 1, 2]
        for layer in range(4):
            part = slice(layer * SIZE // 4, (layer + 1) * SIZE // 4)
            await put.part(layer, [block[part] for block in BLOCKS[1:4]])
            assert house.store.counts.sealed == 1
    assert put.sealed == 3
    assert await house.target("b").fetch("r2", CHAIN, 0) == BLOCKS[:4]


async def test_layers_come_in_order(house: House) -> None:
    with pytest.raises(ValueError, match="layer 0 is next"):
        async with house.target().putting("r1", CHAIN, 0, 1) as put:
            await put.part(1, [BLOCKS[0]])
    assert house.store.arena.taken == 0, "the lease was given back"


async def test_a_block_whose_layers_did_not_all_come_is_not_sealed(house: House) -> None:
    async with house.target().putting("r1", CHAIN, 0, 2) as put:
        await put.part(0, [block[: SIZE // 2] for block in BLOCKS[:2]])
    assert put.sealed == 0
    assert house.store.arena.taken == 0
    assert await house.target().fetch("r2", CHAIN, 0) == []


async def test_only_blocks_that_nobody_has_are_taken(house: House) -> None:
    writer = house.target()
    await stored(writer, "r1", CHAIN, BLOCKS[:2])
    async with writer.putting("r2", CHAIN, 0, 4) as put:
        assert put.wanted == [2, 3]
        await put.part(0, BLOCKS[:4])
    assert await writer.fetch("r3", CHAIN, 0) == BLOCKS[:4]


async def test_a_writer_that_fails_in_the_middle_leaves_nothing(house: House) -> None:
    async def fail() -> None:
        async with house.target().putting("r1", CHAIN, 0, 2) as put:
            await put.part(0, [block[:100] for block in BLOCKS[:2]])
            raise RuntimeError("the model failed")

    with pytest.raises(RuntimeError, match="the model failed"):
        await fail()
    assert house.store.arena.taken == 0


async def test_a_block_that_was_damaged_in_memory_is_not_used(house: House) -> None:
    reader = house.target()
    await stored(reader, "r1", CHAIN, BLOCKS[:3])
    block = house.store.cache.get(CHAIN[1])
    assert block is not None
    (view,) = house.store.arena.views(block.slot)
    view[7] ^= 1
    assert await reader.fetch("r2", CHAIN, 0) == BLOCKS[:1]
    view[7] ^= 1


async def test_a_store_that_does_not_answer_costs_nothing_but_the_wait(house: House) -> None:
    target = house.target()
    for method in ("Lookup", "Reserve"):
        house.bus.broken = {method}
        assert await target.fetch("r", CHAIN, 0) == []
        await stored(target, "r", CHAIN, BLOCKS[:1])
        target._backoff.answered()
        target._backoff._until = 0.0
    house.bus.broken = {"Lookup"}
    await target.fetch("r", CHAIN, 0)
    calls = len(house.bus.calls)
    await target.fetch("r", CHAIN, 0)
    assert len(house.bus.calls) == calls, "it is left alone for a while"


async def test_a_store_that_ends_a_put_is_noticed_and_what_is_left_is_not_sent(house: House) -> None:
    target = house.target(share_memory=False)
    async with target.putting("r", CHAIN, 0, 2) as put:
        await put.part(0, [block[:100] for block in BLOCKS[:2]])
        house.store.cache.release(next(iter(house.store.cache._leases)))
        house.store.settle()
        for layer in range(1, 40):
            await put.part(layer, [block[:100] for block in BLOCKS[:2]])
    assert put.failure is not None
    assert put.failure.reason == "LEASE_EXPIRED"
    assert house.store.cache.room(Tier.RAM) == 0


async def test_a_store_that_ended_the_session_is_connected_to_again(house: House) -> None:
    target = house.target()
    await stored(target, "r", CHAIN, BLOCKS[:1])
    first = (await link(target).memory()).session
    house.memory._ends[first].cancel()
    await stored(target, "r", CHAIN, BLOCKS[:2])
    assert (await link(target).memory()).session != first
    assert await target.fetch("r", CHAIN, 0) == BLOCKS[:2]


def mapped() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:countersign-kv")


async def test_the_memory_of_a_store_that_died_is_let_go(house: House) -> None:
    target = house.target()
    before = mapped()
    await stored(target, "r", CHAIN, BLOCKS[:1])
    assert mapped() == before + 1
    await house.memory.stop()
    house.kv._memory = house.memory = MemoryServer("kv-test-again", house.store.arena.memory, house.store.draw)
    house.memory.start()
    assert await target.fetch("r", CHAIN, 0) == BLOCKS[:1]
    assert link(target).shared == 1, "it is shared with the one that is there now"
    assert mapped() == before + 1


async def test_the_arena_cannot_be_written_by_who_reads_it(house: House) -> None:
    target = house.target()
    await stored(target, "r", CHAIN, BLOCKS[:1])
    memory = await link(target).memory()
    with pytest.raises(TypeError):
        memory.theirs.view[0] = 1
    for place in (await look(house)).places:
        (run,) = place.runs
        assert checksum([memory.theirs.view[run.offset : run.offset + run.length]]) == place.checksum


async def look(house: House) -> LookupResponse:
    await house.target("c").fetch("r", CHAIN, 0)
    reply = house.bus.replies["Lookup"]
    assert isinstance(reply, LookupResponse)
    return reply


@pytest.mark.parametrize("share_memory", [True, False])
async def test_a_lossy_wire_takes_less_room_and_what_comes_back_is_near(house: House, share_memory: bool) -> None:
    wire = Wire("int8", torch.float32, 128)
    sent = [torch.randn(2, 4, 128, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    size = sent[0].numel() * 4
    target = house.target(share_memory=share_memory, size=size, wire=wire)
    async with target.putting("r1", CHAIN, 0, 3) as put:
        for layer in range(2):
            await put.part(layer, [block[layer].numpy().tobytes() for block in sent])
    assert put.sealed == 3
    held = house.store.cache.get(CHAIN[0])
    assert held is not None
    assert held.size == wire.size(size) < size / 3
    for data, block in zip(await target.fetch("r2", CHAIN, 0), sent, strict=True):
        got = torch.frombuffer(bytearray(data), dtype=torch.float32).view(2, 4, 128)
        assert torch.allclose(got, block, atol=0.03)
