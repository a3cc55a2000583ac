"""A store killed under load: no wrong byte, no hang, nothing left of its memory, and a disk that can be read."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from kv_client import SIZE, GrpcBus, data_of
from kv_process import KvProcess

from countersign.services.runtime.rpc import Channel
from countersign.services.target.prefixes import Prefixes, PrefixKeys

KEYS = PrefixKeys(b"w" * 32, "kills")
TEXTS = 12
BLOCKS = 10
RAM, DISK = 48 * SIZE, 64 * SIZE
LOG = logging.getLogger("test")


@dataclass
class Load:
    """Targets that store and fetch as fast as they can; every byte that they fetch is compared."""

    store: KvProcess
    fetched: int = 0
    rounds: int = 0
    more: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, number: int, *, share_memory: bool) -> None:
        rng, address, bus, target = random.Random(number), "", cast("GrpcBus | None", None), cast("Any", None)
        try:
            for turn in itertools.count():
                if self.store.address != address:
                    await self._leave(bus, target)
                    address = self.store.address
                    bus, target = self._join(address, f"t{number}", share_memory=share_memory)
                async with asyncio.timeout(60):
                    await self._round(target, rng, f"r{number}-{turn}")
                self.rounds += 1
                self.more.set()
        finally:
            await self._leave(bus, target)

    async def _round(self, target: Prefixes, rng: random.Random, name: str) -> None:
        chain = KEYS("tenant", [rng.randrange(TEXTS)] * 16 * BLOCKS)
        blocks = [data_of(key) for key in chain]
        got = await target.fetch(name, chain, 0)
        assert got == blocks[: len(got)], "a wrong byte"
        self.fetched += len(got)
        async with target.putting(name, chain, len(got), BLOCKS - len(got)) as put:
            for layer in range(2):
                part = slice(layer * SIZE // 2, (layer + 1) * SIZE // 2)
                await put.part(layer, [block[part] for block in blocks[len(got) :]])

    def _join(self, address: str, name: str, *, share_memory: bool) -> tuple[GrpcBus, Prefixes]:
        bus, ticks = GrpcBus(Channel(address)), itertools.count(0, 1000)
        clock = ticks.__next__  # never rests
        return bus, Prefixes(cast("Any", bus), name, clock, LOG, keys=KEYS, block_bytes=SIZE, share_memory=share_memory)

    @staticmethod
    async def _leave(bus: GrpcBus | None, target: Prefixes | None) -> None:
        if bus is not None and target is not None:
            await target.close()
            await bus.channel.close()

    async def go_on(self, rounds: int) -> None:
        """Until so many more rounds have ended."""
        until = self.rounds + rounds
        async with asyncio.timeout(60):
            while self.rounds < until:
                self.more.clear()
                await self.more.wait()


def mapped() -> int:
    """Memories of stores that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:countersign-kv")


def shared_files() -> list[Path]:
    return sorted(Path("/dev/shm").glob("*countersign*"))


async def hurt(folder: Path, kills: int) -> None:
    rng, shared = random.Random(5), shared_files()
    before = mapped()
    load = Load(KvProcess(folder, RAM, DISK))
    targets = [asyncio.create_task(load.run(number, share_memory=number % 2 == 0)) for number in range(4)]
    restored = 0
    try:
        for _ in range(kills):
            await load.go_on(rng.randrange(4, 40))
            load.store.restart()
            restored += load.store.restored > 0
        await load.go_on(40)
        assert not any(task.done() for task in targets)
    finally:
        for task in targets:
            task.cancel()
        results = await asyncio.gather(*targets, return_exceptions=True)
        load.store.kill()
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results
    assert load.fetched > 0
    assert restored == kills, "the disk could be read each time"
    assert mapped() == before
    assert shared_files() == shared


async def test_a_store_that_is_killed_under_load_costs_speed_only(tmp_path: Path) -> None:
    await hurt(tmp_path, 10)


@pytest.mark.long
@pytest.mark.timeout(1200)
async def test_a_store_that_is_killed_200_times_under_load_costs_speed_only(tmp_path: Path) -> None:
    await hurt(tmp_path, 200)
