"""What a real store under load tells of itself is a behaviour of tla/cache: readers and writers over gRPC, two tiers,
leases and pins that lapse, damage on disk, and a second life.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from kv_client import SIZE, Kv, data_of

from countersign.services.kv.disk import Disk
from countersign.services.kv.service import KvService
from countersign.services.kv.store import BlockStore
from countersign.services.protocol.cache import Tier
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.errors import DataLoss, FailedPrecondition
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.verify.spec.run import read_run, write_run
from countersign.verify.spec.steps import CacheRun, StepRecorder
from countersign.verify.spec.trace import replay

BLOCKS = 8
CHAINS = [chain_keys(root_key(b"w" * 32, "fp32", tenant), range(16 * 3)) for tenant in "abcdef"]


@asynccontextmanager
async def served(folder: Path, recorder: StepRecorder) -> AsyncIterator[tuple[BlockStore, str]]:
    store = BlockStore(BLOCKS * SIZE, disk=Disk(folder, BLOCKS * SIZE), clock=time.monotonic, observer=recorder)
    recorder.cache = store.cache
    await store.start()
    server = RpcServer("127.0.0.1:0")
    service = KvService(store, lambda: "")
    server.add(service)
    running = asyncio.create_task(service.run())
    try:
        yield store, await server.start()
        await store.drained()
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError):
            await running
        await server.stop(0)
        store.check_integrity()
        await service.close()


async def worker(address: str, name: str, rounds: int) -> int:
    """Stores and fetches chains as a target does, and now and then forgets to end what it began; blocks found."""
    rng, found = random.Random(name), 0
    client = Kv(Channel(address))
    try:
        for _ in range(rounds):
            chain = rng.choice(CHAINS)[: rng.randint(1, 3)]
            found += await fetch(client, chain, name, rng)
            with suppress(FailedPrecondition):
                if rng.random() < 0.2:
                    await client.reserve(chain, name, ttl_ms=20)
                else:
                    await client.store_chain(chain, name)
    finally:
        await client.channel.close()
    return found


async def fetch(client: Kv, chain: Sequence[bytes], name: str, rng: random.Random) -> int:
    """The bytes are right, or it is a miss."""
    reply = await client.look(chain, ttl_ms=rng.choice([5, 2000]), holder=name)
    if not reply.found:
        return 0
    try:
        got = await client.get(chain[: reply.found], reply.pin)
    except (DataLoss, FailedPrecondition):
        return 0
    assert got == [data_of(key) for key in chain[: len(got)]]
    if rng.random() < 0.7:
        await client.release(reply.pin)
    return len(got)


@pytest.mark.parametrize(("workers", "rounds"), [(4, 12), pytest.param(8, 40, marks=pytest.mark.long)])
async def test_what_a_store_under_load_tells_is_explained(tmp_path: Path, workers: int, rounds: int) -> None:
    recorder = StepRecorder(time.monotonic)
    found = 0
    for life in range(2):
        async with served(tmp_path / "disk", recorder) as (store, address):
            named = [worker(address, f"target-{life}-{number}", rounds) for number in range(workers)]
            found += sum(await asyncio.gather(*named))
            assert store.cache.evictions[Tier.RAM]
    told = {step.told.action for step in recorder.steps}
    assert found
    assert told >= {"Lookup", "Reserve", "Write", "Seal", "Read", "Release", "Evict", "Spill", "Spilled", "Restore"}
    file = tmp_path / "store.jsonl"
    file.write_text(write_run(CacheRun(store.cache.capacity, 4096, tuple(recorder.steps))))
    verdict = replay(read_run(file))
    assert verdict.accepted, verdict
    assert verdict.total >= 100
