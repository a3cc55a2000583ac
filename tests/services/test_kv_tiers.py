"""What every tier of the store must do, whether the bytes lie in RAM, on disk or at another store."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from kv_client import SIZE, data_of

from countersign.services.kv import disk, peers
from countersign.services.kv import store as kv_store
from countersign.services.kv.arena import PAGE, Arena
from countersign.services.kv.disk import Disk
from countersign.services.kv.peers import Peers
from countersign.services.kv.service import KvService
from countersign.services.kv.store import BlockStore, Place
from countersign.services.protocol.cache import Copy, Recency, Stored, Tier
from countersign.services.protocol.checksum import checksum
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.errors import CountersignError, FailedPrecondition
from countersign.services.runtime.extents import Extents
from countersign.services.runtime.rpc import RpcServer
from countersign.v1.registry_pb2 import Instance

KEYS = chain_keys(root_key(b"w" * 32, "fp32", "tenant"), range(16 * 12))
LOG = logging.getLogger("test")


def stored(index: int, size: int = SIZE, generation: int | None = None) -> Stored:
    key = KEYS[index]
    digest = checksum([data_of(key, size)])
    parent = KEYS[index - 1] if index else b""
    return Stored(key, parent, size, b"k" * 32, digest, index + 1 if generation is None else generation)


class Conformance:
    """A tier keeps blocks of any size under (key, generation), whole or not at all.

    Subclasses give a ``tier`` with ``put(entry, data)``, ``get(entry)`` (None when it has none) and ``drop(entry)``.
    """

    async def test_what_is_put_comes_back(self, tier: Any) -> None:
        for index in range(4):
            await tier.put(stored(index), data_of(KEYS[index]))
        assert [await tier.get(stored(index)) for index in range(5)] == [*(data_of(key) for key in KEYS[:4]), None]

    @pytest.mark.parametrize("size", [1, PAGE - 1, PAGE + 1, 5 * PAGE])
    async def test_a_block_may_have_any_size(self, tier: Any, size: int) -> None:
        await tier.put(stored(0, size), data_of(KEYS[0], size))
        assert await tier.get(stored(0, size)) == data_of(KEYS[0], size)

    async def test_what_is_dropped_is_gone_and_the_rest_stays(self, tier: Any) -> None:
        for index in range(3):
            await tier.put(stored(index), data_of(KEYS[index]))
        await tier.drop(stored(2))
        assert [await tier.get(stored(index)) for index in range(3)] == [data_of(KEYS[0]), data_of(KEYS[1]), None]

    async def test_the_room_of_what_is_dropped_is_used_again(self, tier: Any) -> None:
        for _ in range(50):
            for index in range(6):
                await tier.put(stored(index), data_of(KEYS[index]))
            for index in reversed(range(6)):
                await tier.drop(stored(index))
        assert await tier.get(stored(0)) is None

    async def test_a_damaged_block_is_as_good_as_absent(self, tier: Any) -> None:
        for index in range(2):
            await tier.put(stored(index), data_of(KEYS[index]))
        await tier.damage(stored(1))
        assert [await tier.get(stored(index)) for index in range(2)] == [data_of(KEYS[0]), None]


class ArenaTier:
    def __init__(self) -> None:
        self.arena = Arena("countersign-test", 16 * PAGE)

    async def put(self, entry: Stored, data: bytes) -> None:
        self.arena.take(entry.generation, entry.size)
        self.arena.write(entry.generation, 0, data)

    async def get(self, entry: Stored) -> bytes | None:
        if entry.generation not in self.arena or self.arena.checksum(entry.generation) != entry.checksum:
            return None
        return self.arena.read(entry.generation)

    async def drop(self, entry: Stored) -> None:
        self.arena.give(entry.generation)

    async def damage(self, entry: Stored) -> None:
        self.arena.views(entry.generation)[0][0] ^= 1


class TestArena(Conformance):
    @pytest.fixture
    def tier(self) -> Any:
        tier = ArenaTier()
        yield tier
        tier.arena.close()

    def test_a_block_is_laid_over_pieces_when_no_run_is_long_enough(self) -> None:
        arena = Arena("countersign-test", 6 * PAGE)
        for number in range(6):
            arena.take(number, PAGE)
        for number in (1, 3, 5):
            arena.give(number)
        arena.take(10, 3 * PAGE - 5)
        data = random.Random(1).randbytes(3 * PAGE - 5)
        arena.write(10, 0, data)
        arena.write(10, PAGE - 3, data[PAGE - 3 : 2 * PAGE + 7])
        assert len(arena.runs(10)) == 3
        assert arena.read(10) == data
        assert arena.read(10, PAGE - 2, 2 * PAGE + 1) == data[PAGE - 2 : 2 * PAGE + 1]
        assert arena.checksum(10) == checksum([data])
        with pytest.raises(MemoryError):
            arena.take(11, 1)
        arena.close()


class DiskTier:
    def __init__(self, folder: Path) -> None:
        self.disk = Disk(folder, 1 << 20)

    async def put(self, entry: Stored, data: bytes) -> None:
        assert self.disk.put([(entry, data)])

    async def get(self, entry: Stored) -> bytes | None:
        return self.disk.get(entry)

    async def drop(self, entry: Stored) -> None:
        self.disk.drop([(entry.key, entry.generation)])

    async def damage(self, entry: Stored) -> None:
        with self.disk._environment.begin(write=True) as transaction:
            data = bytearray(transaction.get(b"d" + entry.key) or b"")
            data[-1] ^= 1
            transaction.put(b"d" + entry.key, bytes(data))


class TestDisk(Conformance):
    @pytest.fixture
    def tier(self, tmp_path: Path) -> Any:
        tier = DiskTier(tmp_path / "kv")
        yield tier
        tier.disk.close()

    def test_what_was_put_is_listed_after_a_restart(self, tmp_path: Path) -> None:
        first = Disk(tmp_path, 1 << 20)
        assert first.put([(stored(index), data_of(KEYS[index])) for index in range(3)])
        first.drop([(KEYS[1], 99), (KEYS[2], 3)])
        first.close()
        second = Disk(tmp_path, 1 << 20)
        assert sorted(second.entries(), key=lambda entry: entry.generation) == [stored(0), stored(1)]
        assert second.get(stored(1)) == data_of(KEYS[1])
        assert second.get(stored(1, generation=99)) is None
        second.close()

    def test_an_entry_that_was_altered_is_not_listed(self, tmp_path: Path) -> None:
        first = Disk(tmp_path, 1 << 20)
        assert first.put([(stored(index), data_of(KEYS[index])) for index in range(3)])
        with first._environment.begin(write=True) as transaction:
            transaction.put(b"m" + KEYS[0], (transaction.get(b"m" + KEYS[1]) or b""))
            transaction.put(b"m" + KEYS[1], b"short")
        first.close()
        second = Disk(tmp_path, 1 << 20)
        assert second.entries() == [stored(2)]
        second.close()

    def test_one_process_at_a_time_has_the_folder(self, tmp_path: Path) -> None:
        first = Disk(tmp_path, 1 << 20)
        with pytest.raises(FailedPrecondition) as refusal:
            Disk(tmp_path, 1 << 20)
        assert refusal.value.reason == "FOLDER_TAKEN"
        first.close()
        Disk(tmp_path, 1 << 20).close()

    def test_a_folder_that_cannot_be_made_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(FailedPrecondition) as refusal:
            Disk(tmp_path / "file" / "kv", 1 << 20)
        assert refusal.value.reason == "FOLDER_UNUSABLE"

    def test_a_file_that_is_no_database_is_thrown_away(self, tmp_path: Path) -> None:
        (tmp_path / "blocks").mkdir()
        (tmp_path / "blocks" / "data.mdb").write_bytes(b"x" * 100_000)
        made = Disk(tmp_path, 1 << 20)
        assert made.entries() == []
        assert made.put([(stored(0), data_of(KEYS[0]))])
        made.close()

    def test_a_file_that_ends_every_start_is_thrown_away_in_the_end(self, tmp_path: Path) -> None:
        first = Disk(tmp_path, 1 << 20)
        assert first.put([(stored(0), data_of(KEYS[0]))])
        first.entries()
        first.close()
        for _ in range(disk._STARTS):
            Disk(tmp_path, 1 << 20).close()  # as if it had died before it could read
        last = Disk(tmp_path, 1 << 20)
        assert last.entries() == []
        last.close()

    def test_a_full_disk_takes_no_more_and_keeps_what_it_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(disk, "_SLACK", 1 << 20)
        full = Disk(tmp_path, 1 << 16)
        blocks = [(stored(index, 200_000), data_of(KEYS[index], 200_000)) for index in range(12)]
        taken = [full.put([block]) for block in blocks]
        assert taken[0]
        assert not taken[-1]
        assert full.get(blocks[0][0]) == blocks[0][1]
        full.close()


class FakeRegistry:
    def __init__(self, *instances: Instance) -> None:
        self.instances = list(instances)

    def live(self, service: str) -> list[Instance]:
        return self.instances


class PeerTier:
    """Puts go to one store; gets ask another, which has to fetch."""

    def __init__(self, far: BlockStore, near: BlockStore, reach: Peers) -> None:
        self.far, self.near, self.peers = far, near, reach
        self.numbers = itertools.count()

    async def put(self, entry: Stored, data: bytes) -> None:
        place = Place(entry.key, entry.parent)
        (reserved,) = self.far.reserve([place], entry.size, entry.kind, f"w{next(self.numbers)}", ttl=60)
        self.far.write(entry.key, reserved.lease, 0, data)
        self.far.seal(entry.key, reserved.lease, entry.checksum)

    async def get(self, entry: Stored) -> bytes | None:
        keys = KEYS[: KEYS.index(entry.key) + 1]
        found = self.near.lookup(keys, "r", ttl=60)
        if found.count < len(keys) and await self.peers.fetch(keys, found.count):
            self.near.release([found.pin])
            found = self.near.lookup(keys, "r", ttl=60)
        if found.count < len(keys):
            return None
        block = self.near.block(entry.key, found.pin)
        data = await self.near.read(block, found.pin, 0, block.size)
        self.near.release([found.pin])
        return data

    async def drop(self, entry: Stored) -> None:
        for store in (self.far, self.near):
            block = store.cache.get(entry.key)
            if block is not None:
                store.cache.condemn(entry.key, block.generation)
                store.settle()

    async def damage(self, entry: Stored) -> None:
        block = self.far.cache.get(entry.key)
        assert block is not None
        self.far.arena.views(block.slot)[0][0] ^= 1


class TestPeer(Conformance):
    @pytest_asyncio.fixture
    async def tier(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[PeerTier]:
        for bound in ("WAIT_S", "_LOOKUP_S"):
            monkeypatch.setattr(peers, bound, 10.0)
        far, near = BlockStore(64 * PAGE), BlockStore(64 * PAGE)
        server = RpcServer("127.0.0.1:0")
        service = KvService(far, lambda: "far:1")
        server.add(service)
        address = await server.start()
        registry = FakeRegistry(Instance(instance="far", address=address), Instance(instance="near", address="x:1"))
        reach = Peers(near, cast("Any", registry), "near", LOG)
        yield PeerTier(far, near, reach)
        await reach.close()
        await server.stop(0)
        near.check_integrity()
        await near.close()
        await service.close()

    async def test_two_that_ask_for_the_same_share_one_transfer(self, tier: PeerTier) -> None:
        for index in range(4):
            await tier.put(stored(index), data_of(KEYS[index]))
        assert await asyncio.gather(*(tier.peers.fetch(KEYS[:4], 0) for _ in range(3))) == [True] * 3
        assert tier.near.counts.from_peers == 4
        assert tier.far.cache.pins == 0

    async def test_a_peer_that_does_not_answer_costs_a_bounded_wait(
        self, tier: PeerTier, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for bound in ("WAIT_S", "_LOOKUP_S"):
            monkeypatch.setattr(peers, bound, 0.01)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"127.0.0.1:{silent.getsockname()[1]}"
            cast("Any", tier.peers._registry).instances = [Instance(instance="silent", address=address)]
            async with asyncio.timeout(5):
                assert not await tier.peers.fetch(KEYS[:2], 0)


# The store over its two tiers


def store_over(folder: Path, ram: int = 4, disk_pages: int = 64) -> BlockStore:
    return BlockStore(ram * PAGE, disk=Disk(folder, disk_pages * PAGE), policy=Recency)


def fill(store: BlockStore, first: int, last: int) -> None:
    for index in range(first, last):
        entry = stored(index)
        (reserved,) = store.reserve([Place(entry.key, entry.parent)], SIZE, entry.kind, "w", ttl=60)
        store.write(entry.key, reserved.lease, 0, data_of(entry.key))
        store.seal(entry.key, reserved.lease, entry.checksum)


async def read_all(store: BlockStore, count: int) -> list[bytes]:
    found = store.lookup(KEYS[:count], "r", ttl=60)
    blocks = await store.bring(KEYS[: found.count], found.pin)
    data = [await store.read(block, found.pin, 0, block.size) for block in blocks]
    store.release([found.pin])
    return data


async def spilled(store: BlockStore) -> None:
    running = asyncio.create_task(store.run())
    async with asyncio.timeout(20):
        await store.drained()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_what_leaves_ram_is_read_from_disk_and_comes_back_into_ram(tmp_path: Path) -> None:
    store = store_over(tmp_path)
    for start in (0, 4, 8):
        fill(store, start, start + 4)
        await spilled(store)
    assert await read_all(store, 12) == [data_of(key) for key in KEYS]
    assert store.cache.room(Tier.DISK) == 12 * PAGE
    assert store.cache.evictions[Tier.RAM] >= 8
    pin = store.lookup(KEYS[:4], "r", ttl=60).pin
    blocks = await store.bring(KEYS[:4], pin)
    assert all(block.slot in store.arena for block in blocks)
    store.check_integrity()
    await store.close()


async def test_a_restart_finds_the_disk_whole(tmp_path: Path) -> None:
    store = store_over(tmp_path)
    fill(store, 0, 4)
    await spilled(store)
    await store.close()
    again = store_over(tmp_path)
    assert await again.start() == 4
    assert await read_all(again, 4) == [data_of(key) for key in KEYS[:4]]
    await again.close()


async def test_blocks_that_were_damaged_on_disk_go_with_all_below_and_the_rest_is_read(tmp_path: Path) -> None:
    store = store_over(tmp_path)
    fill(store, 0, 4)
    await spilled(store)
    await store.close()
    file = tmp_path / "blocks" / "data.mdb"
    content = file.read_bytes()
    at = content.index(data_of(KEYS[2])[:64])
    file.write_bytes(content[: at + 100] + bytes([content[at + 100] ^ 4]) + content[at + 101 :])
    again = store_over(tmp_path)
    assert await again.start() == 4
    assert await read_all(again, 4) == [data_of(key) for key in KEYS[:2]]
    assert again.damaged == 1
    assert again.lookup(KEYS[:4], "r", ttl=60).count == 2
    fill(again, 2, 4)
    await spilled(again)
    assert await read_all(again, 4) == [data_of(key) for key in KEYS[:4]]
    again.check_integrity()
    await again.close()


@pytest.mark.parametrize("given_up", ["by the caller", "after a while"])
async def test_a_look_up_that_is_given_up_leaves_no_block_half_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given_up: str
) -> None:
    store = store_over(tmp_path)
    fill(store, 0, 4)
    await spilled(store)
    await store.close()
    again = store_over(tmp_path)
    await again.start()
    go, mover = threading.Event(), again._mover
    assert mover is not None
    mover._thread.submit(go.wait)  # the disk is slow
    monkeypatch.setattr(kv_store, "BRING_S", 0.01 if given_up == "after a while" else 60.0)
    found = again.lookup(KEYS[:4], "r", ttl=60)
    looking = asyncio.create_task(again.bring(KEYS[:4], found.pin))
    await asyncio.sleep(0)
    if given_up == "by the caller":
        looking.cancel()
    done, _ = await asyncio.wait({looking}, timeout=10)
    assert done
    assert again.cache.promote(KEYS[0], now=0) is None, "it is on its way"
    go.set()
    await mover._background.drain()
    assert again.cache.room(Tier.RAM) == 4 * PAGE
    assert all(block.copies == [Copy.WHOLE, Copy.WHOLE] for block in again.cache.sealed())
    again.check_integrity()
    await again.close()


async def test_a_block_that_cannot_be_brought_into_ram_is_read_from_disk_in_place(tmp_path: Path) -> None:
    store = store_over(tmp_path)
    fill(store, 0, 4)
    await spilled(store)
    await store.close()
    again = store_over(tmp_path, ram=1)
    await again.start()
    found = again.lookup(KEYS[:4], "r", ttl=60)
    blocks = await again.bring(KEYS[:4], found.pin)
    data = [await again.read(block, found.pin, 10, 20) for block in blocks]
    assert data == [data_of(key)[10:20] for key in KEYS[:4]]
    await again.close()


async def test_a_damaged_block_that_is_read_in_place_is_refused_by_name(tmp_path: Path) -> None:
    store = store_over(tmp_path)
    fill(store, 0, 2)
    await spilled(store)
    await store.close()
    again = store_over(tmp_path)
    await again.start()
    mover = again._mover
    assert mover is not None
    await mover._on_disk(mover._disk.drop, [(KEYS[1], 2)])
    found = again.lookup(KEYS[:2], "r", ttl=60)
    block = again.block(KEYS[1], found.pin)
    with pytest.raises(CountersignError) as refusal:
        await again.read(block, found.pin, 0, 1)
    assert refusal.value.reason == "BLOCK_DAMAGED"
    assert again.lookup(KEYS[:2], "r", ttl=60).count == 1
    await again.close()


# Pages


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 9)), max_size=60))
def test_pages_are_given_once_and_all_that_is_free_fits(steps: list[tuple[bool, int]]) -> None:
    free, held = Extents(24), list[list[tuple[int, int]]]()
    for take, number in steps:
        if take and number <= free.free:
            held.append(free.take(number))
            assert sum(count for _, count in held[-1]) == number
        elif take:
            with pytest.raises(MemoryError):
                free.take(number)
        elif held:
            free.give(held.pop(number % len(held)))
        pages = [page for extents in held for first, count in extents for page in range(first, first + count)]
        assert len(set(pages)) == len(pages) == 24 - free.free
        assert all(0 <= page < 24 for page in pages)
    for extents in held:
        free.give(extents)
    assert free.take(24) == [(0, 24)]
