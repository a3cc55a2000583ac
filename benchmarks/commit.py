"""What the commit protocol costs: a round, an append, and to be watched.

A round: one stream in the real target loop on the demo target, its log in JetStream, against the same loop with a log
in memory that answers at once, in turns. Watching: whole stacks with and without the sidecar, in turns.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from countersign.cli.bench import Row, stack_config
from countersign.cli.prompts import heldout_prompts
from countersign.cli.streams import throughput
from countersign.client import Client, Tokens
from countersign.services.engine.engine import Engine
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import load_model
from countersign.services.protocol.commit import LogState
from countersign.services.protocol.driver import LogStore, settle
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.subjects import commit_subject
from countersign.services.protocol.writer import Writer
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import Config, NatsConfig
from countersign.services.runtime.journal import Entry, Journal
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.supervisor import SERVICES, Supervisor, service_command
from countersign.services.target.committer import Committer
from countersign.services.target.loop import TargetLoop
from countersign.services.target.prefixes import PrefixKeys
from countersign.services.target.receipts import ReceiptMaker
from countersign.services.target.session import Session
from countersign.services.target.stopping import Stopper
from countersign.v1.commit_pb2 import Opened
from countersign.v1.router_pb2 import ModelInfo
from countersign.v1.sampling_pb2 import FINISH_REASON_LENGTH, Drafting, SamplingParams
from countersign.v1.sidecar_pb2 import Violation

PLANTED = Path(__file__).resolve().parents[1] / "tests" / "support" / "planted.py"
TURNS = 20
SETTLE_S = 1.0
PROMPT = "class Stack:\n    def push(self, item):\n"


class Store(LogStore, Protocol):
    """A log to write to."""

    async def append(self, subject: str, data: bytes, *, expected: int, timeout: float) -> int: ...  # noqa: ASYNC109

    async def last(self, subject: str) -> Entry | None: ...


@dataclass(slots=True)
class MemoryLog:
    """Stores and answers at once."""

    subjects: dict[str, list[Entry]] = field(default_factory=dict)
    count: int = 0

    async def try_append(self, subject: str, data: bytes, *, expected: int) -> int | Literal["refused", "lost"]:  # noqa: ARG002
        self.count += 1
        self.subjects.setdefault(subject, []).append(Entry(self.count, data))
        return self.count

    async def append(self, subject: str, data: bytes, *, expected: int, timeout: float) -> int:  # noqa: ASYNC109, ARG002
        return int(await self.try_append(subject, data, expected=expected))

    async def read(self, subject: str, *, after: int = 0) -> Sequence[Entry]:
        return [entry for entry in self.subjects.get(subject, []) if entry.sequence > after]

    async def last(self, subject: str) -> Entry | None:
        return next(reversed(self.subjects.get(subject, [])), None)


class NoDrafts:
    """Nobody proposes."""

    async def propose(self, _: object) -> dict[str, object]:
        return {}

    async def forget(self, _: str) -> None:
        return


async def run(quick: bool) -> list[Row]:
    """Rounds, appends, watching, and how soon a planted bug is reported."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        config = stack_config(folder)
        async with _journal(Path(folder)) as journal:
            rows += await _rounds(config, journal, 1 if quick else 4)
            rows += await _appends(journal, 100 if quick else 500, 10 if quick else 40)
    rows += await _watching(16 if quick else 96)
    rows += await _ends(4 if quick else 40)
    rows += await _planted(1 if quick else 5)
    return rows


@asynccontextmanager
async def _journal(folder: Path) -> AsyncIterator[Journal]:
    async with NatsServer(folder / "nats") as server:
        bus = await Bus.connect(server.url, "benchmark")
        try:
            journal = Journal(bus)
            await journal.ensure_streams(NatsConfig())
            yield journal
        finally:
            await bus.close()


async def _rounds(config: Config, journal: Journal, turns: int) -> list[Row]:
    model = load_model(config.target.model)
    tokens, with_log, without = 256, list[float](), list[float]()
    for turn in range(turns):
        with_log += await _passes(model, cast("Store", journal), f"nats-{turn}", tokens)
        without += await _passes(model, MemoryLog(), f"memory-{turn}", tokens)
    # The first pass is the prompt's, the last waits for the receipt.
    both = statistics.median(with_log), statistics.median(without)
    cost = (both[0] - both[1]) * 1e3
    case = f"one stream, no draft, {tokens} tokens"
    ratio, n = both[0] / both[1], len(with_log)
    return [
        Row("commit", case, "a round with the log, p50", both[0] * 1e3, "ms", n, peer="log in memory", ratio=ratio),
        Row("commit", case, "what the protocol adds to a round, p50", cost, "ms", n, "<= 0.6", cost <= 0.6),
    ]


async def _passes(model: Any, store: Store, name: str, tokens: int) -> list[float]:
    """Seconds from pass to pass of one request."""
    engine = Engine.of(model, PagedCache(model.config, "fp32", tokens=4096))
    log = logging.getLogger("benchmark")
    keys = PrefixKeys(bytes(32), "benchmark")
    loop = TargetLoop(engine, cast("Any", NoDrafts()), None, keys, wall_ms=_now_ms, log=log)
    digest = bytes(32)
    info = ModelInfo(name="m", weights_sha256=digest, tokenizer_sha256=digest, config_sha256=digest, dtype="fp32")
    maker = ReceiptMaker(Ed25519PrivateKey.generate(), info, "benchmark")
    committer = Committer(cast("Any", store), maker, _now_ms, loop.wake, log)
    opener = Opener(LogState(name))
    sampling = SamplingParams(max_tokens=tokens, top_p=1.0)
    opened = Opened(prompt_token_ids=range(3, 40), sampling=sampling, drafting=Drafting.DRAFTING_OFF, salt_key=digest)
    await settle(opener, opener.open(opened), store)
    await settle(opener, opener.assign("t"), store)
    session = Session(
        request_id=name,
        opened=opened,
        writer=Writer(opener.log, epoch=1, instance="t"),
        stopper=Stopper(frozenset(), tokens),
        generation=Generation(name, list(opened.prompt_token_ids), tokens),
    )
    times: list[float] = []
    settled = engine.settle

    def noted(*arguments: Any) -> None:
        settled(*arguments)
        times.append(time.perf_counter())

    setattr(engine, "settle", noted)  # noqa: B010  to see the passes go by
    running = asyncio.create_task(loop.run())
    loop.add(session, committer)
    while loop.sessions:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    await loop.close()
    return [after - before for before, after in itertools.pairwise(times[1:])]


async def _appends(journal: Journal, requests: int, passes: int) -> list[Row]:
    """Every request extends its log pass by pass, all at once; each append waits for the ack of its last only."""

    async def one(number: int) -> None:
        opener = Opener(LogState(f"load-{number}"))
        sampling = SamplingParams(max_tokens=4 * passes, top_p=1.0)
        await settle(opener, opener.open(Opened(prompt_token_ids=[1], sampling=sampling)), journal)
        await settle(opener, opener.assign("t"), journal)
        writer = Writer(opener.log, epoch=1, instance="t")
        for _ in range(passes):
            await settle(writer, writer.extend([1, 2, 3, 4]), journal)
        await settle(writer, writer.close(FINISH_REASON_LENGTH), journal)

    begin = time.perf_counter()
    await asyncio.gather(*(one(number) for number in range(requests)))
    whole = requests * (passes + 3) / (time.perf_counter() - begin)
    # The stream and its client alone, without the machines: what there is to have.
    begin = time.perf_counter()
    await asyncio.gather(*(_bare(journal, f"bare-{number}", passes + 3) for number in range(requests)))
    bare = requests * (passes + 3) / (time.perf_counter() - begin)
    case, count = f"{requests} requests at once, one process", requests * (passes + 3)
    met, unit = whole >= 8000, "appends/s"
    return [
        Row("commit", case, "of the protocol", whole, unit, count, ">= 8000", met, "bare appends", whole / bare),
        Row("commit", case, "bare appends", bare, unit, count),
    ]


async def _bare(journal: Journal, name: str, count: int) -> None:
    last, data = 0, bytes(100)
    for _ in range(count):
        last = await journal.append(commit_subject(name), data, expected=last, timeout=30)


async def _watching(requests: int) -> list[Row]:
    """Tokens a second of two stacks that differ in the sidecar, in turns."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as watched, tempfile.TemporaryDirectory() as alone:
        folders = {True: watched, False: alone}
        configs = {}
        for on, folder in folders.items():
            configs[on] = stack_config(folder, f"sidecar.enabled={str(on).lower()}")
        prompts = [p.text for p in heldout_prompts(configs[True].target.model.parent, 16)]
        async with Supervisor(configs[True]) as one, Supervisor(configs[False]) as other:
            addresses = {True: one.router_address, False: other.router_address}
            pid = one.pid("sidecar")
            used = _processor_s(pid)
            for turn in range(TURNS + 1):
                for on in (True, False) if turn % 2 else (False, True):
                    speed = await throughput(addresses[on], prompts, requests)
                    await asyncio.sleep(SETTLE_S)  # the sidecar may be behind, and would slow the other stack
                    if turn:  # the first warms up
                        speeds[on].append(speed)
            used = _processor_s(pid) - used
    ratios = [with_ / without for with_, without in zip(speeds[True], speeds[False], strict=True)]
    overhead = 1 - statistics.median(ratios)
    case = f"16 streams, {requests} answers of 64 tokens, {TURNS} turns"
    speed, met = statistics.median(speeds[True]), overhead <= 0.02
    each = used / (TURNS + 1) / requests / 64
    return [
        Row("commit", case, "processor time of the sidecar", each * 1e6, "us/token", TURNS + 1),
        Row("commit", case, "watched", speed, "tokens/s", TURNS, peer="not watched", ratio=1 - overhead),
        Row("commit", case, "throughput that watching takes", overhead, "share", TURNS, "<= 0.02", met),
    ]


def _processor_s(pid: int | None) -> float:
    """What a process has used so far, of a kernel that tells (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _ends(count: int) -> list[Row]:
    """From a cancel, or a deadline, until the request is closed and its client told."""
    cancels, deadlines = list[float](), list[float]()
    with tempfile.TemporaryDirectory() as folder:
        config = stack_config(folder)
        async with Supervisor(config) as stack, Client(stack.router_address) as client:
            for number in range(count):
                cancels.append(await _cancelled(client, f"cancel-{number}"))
                begin = time.monotonic()
                async for _ in client.generate(PROMPT, max_tokens=1900, ignore_eos=True, timeout=0.5):
                    pass
                deadlines.append(time.monotonic() - begin - 0.5)
    rows = []
    for what, times in (("a cancel", cancels), ("a deadline", deadlines)):
        worst = max(times)
        name = f"from {what} until all have ended, worst"
        rows.append(Row("commit", "an answer in the middle", name, worst, "s", count, "<= 0.2", worst <= 0.2))
    return rows


async def _cancelled(client: Client, request_id: str) -> float:
    begin = 0.0
    async for event in client.generate(PROMPT, max_tokens=1900, ignore_eos=True, request_id=request_id):
        if isinstance(event, Tokens) and not begin:
            begin = time.monotonic()
            cancel = asyncio.create_task(client.cancel(request_id))
    await cancel
    return time.monotonic() - begin


async def _planted(count: int) -> list[Row]:
    """From the append that no target sampled to the word of it."""
    delays: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        config = stack_config(folder)
        services = {name: service_command(name) for name in SERVICES}
        services["target"] = [sys.executable, str(PLANTED), "target", "commits_another_token"]
        async with Supervisor(config, services=services) as stack, Client(stack.router_address) as client:
            bus = await Bus.connect(stack.nats_url, "benchmark")
            reports: asyncio.Queue[Violation] = asyncio.Queue()
            committed: dict[str, float] = {}

            async def told(msg: Any) -> None:
                reports.put_nowait(Violation.FromString(msg.data))

            async def seen(msg: Any) -> None:
                committed.setdefault(msg.subject.rpartition(".")[2], time.time())

            await bus.subscribe("cs.v1.event.violation", told)
            await bus.subscribe("cs.v1.committed.*", seen)
            for number in range(count):
                await client.complete("def f(", max_tokens=8, ignore_eos=True, seed=1, request_id=f"planted-{number}")
                violation = await asyncio.wait_for(reports.get(), 30)
                delays.append(violation.found_unix_ms / 1e3 - committed[violation.request_id])
            await bus.close()
    worst, case = max(delays), "a target commits another token than it sampled"
    return [Row("commit", case, "until it is reported, worst", worst, "s", count, "<= 1", worst <= 1)]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
