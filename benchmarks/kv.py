"""The store of KV blocks beside Redis, its look-ups, and what a stored prefix saves and a missing one costs.

Bytes: blocks of 1 MiB, all of one prefix in one call, against Redis's answer to one pipeline of GETs over TCP, turn by
turn. Prefixes: the real target loop on a log in memory, each request on an empty paged cache, with the real service.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign.cli.bench import Row, load
from countersign.services.engine.engine import Engine
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.kv.service import KvService
from countersign.services.kv.store import BlockStore
from countersign.services.protocol.commit import LogState
from countersign.services.protocol.driver import settle
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.writer import Writer
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import NatsConfig, dump
from countersign.services.runtime.config import load as load_config
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.service import Call
from countersign.services.target.committer import Committer
from countersign.services.target.loop import TargetLoop
from countersign.services.target.prefixes import Prefixes, PrefixKeys
from countersign.services.target.receipts import ReceiptMaker
from countersign.services.target.session import Session
from countersign.services.target.stopping import Stopper
from countersign.v1.commit_pb2 import Opened
from countersign.v1.kv_pb2 import LookupRequest
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sampling_pb2 import Drafting, SamplingParams

MIB = 1 << 20
PROMPT = 1504
CHAIN = 512
# RAM, and disk, of a store that is full.
USED = 256 * MIB
_ROOMY = {"kv.ram_bytes": 2 << 30}
STORED = 100_000
LOG = logging.getLogger("benchmark")
_REDIS_CALLS = ("--save", "", "--appendonly", "no", "--bind", "127.0.0.1")


async def run(quick: bool) -> list[Row]:
    """Quick: 24 blocks of bytes, 2 turns, and no 0.3 B shape."""
    with tempfile.TemporaryDirectory() as folder:
        async with _kv_service(Path(folder)) as bus:
            rows = await _bytes(bus, 24 if quick else 192, 3 if quick else 9)
            rows += await _look_ups(300 if quick else 3000)
            demo = load_config(None, {}, []).target.model
            rows += await _prefixes(bus, "demo target", load_model(demo), 5.0, 2 if quick else 8)
            if not quick:
                rows += await _prefixes(bus, "0.3 B shape", await _large(), 8.0, 3)
        for tiers, disk in (("RAM", 0), ("RAM and disk", USED)):
            room = {"kv.ram_bytes": USED, "kv.disk_bytes": disk}
            async with _kv_service(Path(folder) / tiers, room) as bus:
                await _use(bus, USED)
                rows += await _misses(bus, f"demo target, {tiers}", load_model(demo), 2 if quick else 12)
                if not quick:
                    rows += await _misses(bus, f"0.3 B shape, {tiers}", await _large(), 3, requests=2)
    return rows


# The service


@asynccontextmanager
async def _kv_service(folder: Path, room: Mapping[str, int] = _ROOMY) -> AsyncIterator[Bus]:
    """A kv process of its own."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    async with NatsServer(folder / "nats") as server:
        settings = [f"data_dir={folder}", f"nats.url={server.url}", *(f"{key}={value}" for key, value in room.items())]
        file = folder / "kv.json"
        file.write_text(dump(load_config(None, {}, settings)))
        command = [sys.executable, "-m", "countersign.services.kv", "--config", str(file)]
        with (folder / "kv.log").open("w") as log:
            process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        bus = await Bus.connect(server.url, "benchmark")
        try:
            await Journal(bus).ensure_streams(NatsConfig())
            async with Registry(bus) as registry:
                await registry.wait_for("kv", 60)
            yield bus
        finally:
            await bus.close()
            process.terminate()
            await process.wait()


# Bytes


async def _bytes(bus: Bus, count: int, turns: int) -> list[Row]:
    """Get and put of ``count`` blocks of 1 MiB."""
    blocks = [np.random.default_rng(number).bytes(MIB) for number in range(count)]
    calls: dict[str, tuple[Callable[[int], Awaitable[object]], Callable[[int], Awaitable[list[bytes]]]]] = {}
    async with contextlib.AsyncExitStack() as stack:
        for name, share in (("shared memory", True), ("gRPC", False)):
            keys = PrefixKeys(os.urandom(32), "benchmark")
            made = Prefixes(bus, name, time.monotonic, LOG, keys=keys, block_bytes=MIB, share_memory=share)
            stack.push_async_callback(made.close)
            calls[name] = (_putter(made, keys, blocks), _getter(made, keys, count))
        peer = await stack.enter_async_context(_redis())
        if peer is not None:
            calls["Redis"] = (lambda turn: peer.put(turn, blocks), lambda turn: peer.get(turn, count))
        puts, gets = await _in_turns(calls, blocks, turns)
    copy = _copy_rate()
    case, rows = f"{count} blocks of 1 MiB, one host", []
    rival = statistics.median(gets["Redis"]) if peer is not None else None
    for name, bar in (("shared memory", 3.0), ("gRPC", 1.0)):
        rate = count / 1024 / statistics.median(gets[name])
        ratio = None if rival is None else rival / statistics.median(gets[name])
        asked = (f">= {bar:g}x", ratio >= bar, peer.name, ratio) if ratio is not None and peer is not None else ()
        rows.append(Row("kv", case, f"Get through {name}", rate, "GiB/s", turns, *asked))
        share = 1024**3 * rate / copy
        rows.append(Row("kv", case, f"Get through {name}, of what one thread copies", share, "share", turns))
        ratio = None if peer is None else statistics.median(puts["Redis"]) / statistics.median(puts[name])
        rate = count / 1024 / statistics.median(puts[name])
        theirs = (None, None, peer.name, ratio) if peer is not None else ()
        rows.append(Row("kv", case, f"Put through {name}", rate, "GiB/s", turns, *theirs))
    if rival is not None:
        rows.append(Row("kv", case, "Get of Redis, one pipeline over TCP", count / 1024 / rival, "GiB/s", turns))
    return rows


def _putter(prefixes: Prefixes, keys: PrefixKeys, blocks: Sequence[bytes]) -> Callable[[int], Awaitable[object]]:
    async def put_all(turn: int) -> None:
        async with prefixes.putting(f"put-{turn}", _chain(keys, turn, len(blocks)), 0, len(blocks)) as put:
            await put.whole(dict(enumerate(blocks)))

    return put_all


def _getter(prefixes: Prefixes, keys: PrefixKeys, count: int) -> Callable[[int], Awaitable[list[bytes]]]:
    return lambda turn: prefixes.fetch(f"get-{turn}", _chain(keys, turn, count), 0)


def _chain(keys: PrefixKeys, turn: int, count: int) -> list[bytes]:
    return keys(f"turn-{turn % 2}", range(16 * count))


async def _in_turns(calls: dict[str, Any], blocks: list[bytes], turns: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Seconds of each put and get. Puts of the first two turns are new blocks; later ones are only read."""
    puts: dict[str, list[float]] = {name: [] for name in calls}
    gets: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        order = list(calls.items())
        for name, (put, get) in order if turn % 2 else reversed(order):
            if turn < 2:
                puts[name].append(await _timed(put(turn)))
            begin = time.perf_counter()
            got = await get(turn)
            if turn:  # the first warms up
                gets[name].append(time.perf_counter() - begin)
            if got != blocks:
                raise RuntimeError(f"{name} gave other bytes, or {len(got)} blocks of {len(blocks)}")
    return puts, gets


async def _timed(call: Awaitable[object]) -> float:
    begin = time.perf_counter()
    await call
    return time.perf_counter() - begin


def _copy_rate() -> float:
    """Bytes a second that one thread copies from one place in memory to another."""
    source, target = np.ones(64 * MIB, np.uint8), np.zeros(64 * MIB, np.uint8)
    times = []
    for _ in range(7):
        begin = time.perf_counter()
        np.copyto(target, source)
        times.append(time.perf_counter() - begin)
    return source.nbytes / statistics.median(times)


@dataclass(slots=True)
class _Redis:
    """A redis-server of this run, through redis-py and hiredis."""

    client: Any
    name: str

    async def put(self, turn: int, blocks: Sequence[bytes]) -> None:
        await asyncio.to_thread(self._put, turn % 2, blocks)

    async def get(self, turn: int, count: int) -> list[bytes]:
        return await asyncio.to_thread(self._get, turn % 2, count)

    def _put(self, turn: int, blocks: Sequence[bytes]) -> None:
        with self.client.pipeline(transaction=False) as pipeline:
            for number, block in enumerate(blocks):
                pipeline.set(f"{turn}/{number}", block)
            pipeline.execute()

    def _get(self, turn: int, count: int) -> list[bytes]:
        with self.client.pipeline(transaction=False) as pipeline:
            for number in range(count):
                pipeline.get(f"{turn}/{number}")
            return cast("list[bytes]", pipeline.execute())


@asynccontextmanager
async def _redis() -> AsyncIterator[_Redis | None]:
    """None, with a line that says why, where there is no redis-server or no client for it."""
    binary = shutil.which("redis-server")
    try:
        import redis
    except ImportError:
        binary = None
    if binary is None:
        print("no Redis here (apt-get install redis-server; pip install 'countersign[bench]')", file=sys.stderr)
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = await asyncio.create_subprocess_exec(
        binary, "--port", str(port), *_REDIS_CALLS, stdout=asyncio.subprocess.DEVNULL
    )
    client = redis.Redis(port=port)
    try:
        for _ in range(200):
            with contextlib.suppress(redis.ConnectionError):
                client.ping()
                break
            await asyncio.sleep(0.05)
        yield _Redis(client, f"Redis {client.info('server')['redis_version']}")
    finally:
        client.close()
        process.terminate()
        await process.wait()


# Look-ups


async def _look_ups(count: int) -> list[Row]:
    """The service's handler, request and reply as bytes, in this process: what a look-up takes from a core."""
    store = BlockStore(STORED * 4096)
    chains = [chain_keys(root_key(bytes(32), "benchmark", f"t{n}"), range(16 * CHAIN)) for n in range(STORED // CHAIN)]
    for chain in chains:
        for key, parent in zip(chain, (b"", *chain[:-1]), strict=True):
            lease = store.cache.reserve(key, parent, 4096, "w", now=0, ttl=1).lease
            store.cache.write(key, lease, 0, 4096, now=0)
            store.cache.seal(key, lease, bytes(16), now=0)
    service, call = KvService(store, lambda: "here:1"), Call(2**62, "grpc")
    times = []
    for number in range(count):
        chain = chains[(7 * number) % len(chains)]
        data = LookupRequest(keys=chain, holder="r", ttl_ms=1000, skip=CHAIN).SerializeToString()
        begin = time.perf_counter()
        found = await service.Lookup(LookupRequest.FromString(data), call)
        found.SerializeToString()
        times.append(1e3 * (time.perf_counter() - begin))
        store.release([found.pin])
        if found.found != CHAIN:
            raise RuntimeError(f"{found.found} blocks found of {CHAIN}")
    await store.close()
    p99 = statistics.quantiles(times, n=100)[98]
    case = f"Lookup of {CHAIN} blocks, {len(chains) * CHAIN} stored"
    return [
        Row("kv", case, "p50", statistics.median(times), "ms", count),
        Row("kv", case, "p99", p99, "ms", count, "<= 1", p99 <= 1),
    ]


# Prefixes


async def _prefixes(bus: Bus, name: str, model: Model, bar: float, turns: int) -> list[Row]:
    """Time to the first token of a prompt that nobody computed, and of one that another target stored."""
    cold, warm = list[float](), list[float]()
    for turn in range(turns + 1):
        prompt = _prompt(model, turn)
        async with _target(bus, model, store=True) as target:
            first = await target.answer(prompt)
        async with _target(bus, model, store=True) as target:
            again = await target.answer(prompt)
        if again.tokens != first.tokens or again.cached < PROMPT - 32:
            raise RuntimeError(f"{again.cached} tokens came from the store, and the answers are {first} and {again}")
        if turn:  # the first warms up
            cold.append(first.first)
            warm.append(again.first)
    ratio = statistics.median(cold) / statistics.median(warm)
    case = f"prompt of {PROMPT} tokens, {name}"
    return [
        Row("kv", case, "first token, prefix stored", statistics.median(warm), "s", turns),
        Row("kv", case, "first token, nothing stored", statistics.median(cold), "s", turns),
        Row("kv", case, "a stored prefix is faster by, same tokens", ratio, "x", turns, f">= {bar:g}", ratio >= bar),
    ]


async def _use(bus: Bus, size: int) -> None:
    """Fills RAM and disk twice: the system maps memory when it is first written, which takes longer than what is
    written, and a store that has run for an hour has done that.
    """
    keys, blocks = PrefixKeys(os.urandom(32), "benchmark"), [os.urandom(MIB)] * 32
    prefixes = Prefixes(bus, "filler", time.monotonic, LOG, keys=keys, block_bytes=MIB)
    for turn in range(2 * size // (32 * MIB)):
        async with prefixes.putting(f"fill-{turn}", keys(f"fill-{turn}", range(16 * 32)), 0, 32) as put:
            await put.whole(dict(enumerate(blocks)))
    await prefixes.close()


async def _misses(bus: Bus, name: str, model: Model, turns: int, requests: int = 6) -> list[Row]:
    """Requests one after the other that find nothing stored, beside a target without a store: what one waits longer for
    its answer, and how much longer all take until what they computed is stored too.
    """
    answers: dict[bool, list[float]] = {True: [], False: []}
    whole: dict[bool, list[float]] = {True: [], False: []}
    async with _target(bus, model, store=True) as one, _target(bus, model, store=False) as other:
        for turn in range(turns + 1):
            for store, target in ((True, one), (False, other)) if turn % 2 else ((False, other), (True, one)):
                begin = time.perf_counter()
                made = [await target.answer(_prompt(model, 1000 * (turn + 1) + n), 64) for n in range(requests)]
                await target.loop._background.drain()  # noqa: SLF001  what is being put
                if turn:  # the first connects
                    whole[store].append(time.perf_counter() - begin)
                    answers[store].append(statistics.median(answer.whole for answer in made))
                await asyncio.sleep(0.5)  # what the store still writes to disk is nobody else's
    case = f"prompts of {PROMPT} tokens that nobody stored, 64 new tokens, {name}"
    rows = []
    for what, times in (("an answer, p50", answers), ("all until it is stored", whole)):
        cost = statistics.median(a / b for a, b in zip(times[True], times[False], strict=True)) - 1
        rows.append(
            Row("kv", case, f"time that the store adds to {what}", cost, "share", turns, "<= 0.02", cost <= 0.02)
        )
    return rows


def _prompt(model: Model, number: int) -> list[int]:
    return [int(each) for each in np.random.default_rng(number).integers(10, model.config.vocabulary_size, PROMPT)]


@dataclass(frozen=True, slots=True)
class _Answer:
    """Seconds to the first token and to the end, tokens, and prompt tokens that came from the store."""

    first: float
    whole: float
    tokens: list[int]
    cached: int


@dataclass(slots=True)
class _Target:
    """The target loop on an empty cache."""

    model: Model
    loop: TargetLoop
    committer: Committer
    log: Any
    names: itertools.count[int]

    async def answer(self, prompt: list[int], tokens: int = 8) -> _Answer:
        name = f"r{next(self.names)}"
        opener = Opener(LogState(name))
        sampling = SamplingParams(max_tokens=tokens, top_p=1.0)
        opened = Opened(
            prompt_token_ids=prompt,
            sampling=sampling,
            drafting=Drafting.DRAFTING_OFF,
            salt_key=bytes(32),
            tenant="benchmark",
        )
        await settle(opener, opener.open(opened), self.log)
        await settle(opener, opener.assign("t"), self.log)
        generation = Generation(name, list(prompt), tokens, tenant="benchmark")
        session = Session(
            request_id=name,
            opened=opened,
            writer=Writer(opener.log, epoch=1, instance="t"),
            stopper=Stopper(frozenset(), tokens),
            generation=generation,
        )
        begin = time.perf_counter()
        self.loop.add(session, self.committer)
        first = 0.0
        while self.loop.sessions:
            if not first and session.output_tokens:
                first = time.perf_counter() - begin
            await asyncio.sleep(0.0005)
        return _Answer(first, time.perf_counter() - begin, generation.tokens[len(prompt) :], generation.cached)


@asynccontextmanager
async def _target(bus: Bus, model: Model, *, store: bool) -> AsyncIterator[_Target]:
    cache = PagedCache(model.config, "fp32", tokens=2 * PROMPT)
    engine, keys = Engine.of(model, cache), PrefixKeys(model.digests.weights, "benchmark")
    prefixes = None
    if store:
        prefixes = Prefixes(bus, "target", time.monotonic, LOG, keys=keys, block_bytes=cache.block_bytes)
    commit = load("commit")
    loop = TargetLoop(engine, cast("Any", commit.NoDrafts()), prefixes, keys, wall_ms=_now_ms, log=LOG)
    log, digest = commit.MemoryLog(), bytes(32)
    info = ModelInfo(name="m", weights_sha256=digest, tokenizer_sha256=digest, config_sha256=digest, dtype="fp32")
    maker = ReceiptMaker(Ed25519PrivateKey.generate(), info, "benchmark")
    committer = Committer(log, maker, _now_ms, loop.wake, LOG)
    running = asyncio.create_task(loop.run())
    try:
        yield _Target(model, loop, committer, log, itertools.count())
    finally:
        await loop._background.drain()  # noqa: SLF001  what is being put ends first
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await loop.close()


async def _large() -> Model:
    """The shape that ``benchmarks/engine.py`` writes."""
    engine = load("engine")
    await engine._write_large()  # noqa: SLF001  the same file
    return load_model(engine.LARGE, threads=2)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
