"""Targets and routers killed or stopped in the middle of answers: what the client notices, and whether it was right.

Each run: one answer; once its first tokens are there, its target or its router gets SIGKILL or SIGSTOP. The tokens must
be those of the undisturbed answer with the same seed, and TLC must accept the recorded run.
"""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from countersign.cli.bench import Row, stack_config
from countersign.client import Client, Finished, Tokens
from countersign.services.protocol.commit import replay as replay_log
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.supervisor import SERVICES, Supervisor, service_command
from countersign.v1.sidecar_pb2 import StatusRequest, StatusResponse
from countersign.verify.spec.run import read_run
from countersign.verify.spec.trace import replay

PROMPT = "class Stack:\n    def push(self, item):\n"
LENGTH = 200
SEEDS = 5
HURTS = (
    ("target", signal.SIGKILL),
    ("target", signal.SIGSTOP),
    ("router", signal.SIGKILL),
    ("router", signal.SIGSTOP),
)
ROUTERS = ("router", "router-2")
SILENCE_S = 5.0
"""A client that hears nothing for so long asks another router."""


@dataclass(slots=True)
class Heard:
    """What a client got: tokens, and the longest time without any once the first were there."""

    token_ids: list[int]
    pause: float = 0.0
    last: float = 0.0
    finished: bool = False

    def tokens(self, event: Tokens) -> None:
        now = time.monotonic()
        if self.last:
            self.pause = max(self.pause, now - self.last)
        self.last = now
        self.token_ids += [token.id for token in event.tokens]


@dataclass(frozen=True, slots=True)
class Stage:
    stack: Supervisor
    bus: Bus
    journal: Journal
    registry: Registry

    async def owner(self, request_id: str) -> int:
        log = replay_log(request_id, await self.journal.read(commit_subject(request_id)))
        return next(target.pid for target in self.registry.live("target") if target.instance == log.instance)

    async def whole(self) -> None:
        """Wait until two targets and two routers live."""
        async with asyncio.timeout(120):
            while True:
                pids = {self.stack.pid(name) for name in ("target", "target-2", *ROUTERS)}
                alive = {one.pid for kind in ("target", "router") for one in self.registry.live(kind)}
                if None not in pids and pids <= alive:
                    return
                await asyncio.sleep(0.05)


async def run(quick: bool) -> list[Row]:
    """100 runs, or 4."""
    count = 4 if quick else 100
    with tempfile.TemporaryDirectory() as folder:
        async with _stage(Path(folder)) as stage:
            wholes = [(await _answer(stage, f"whole-{seed}", seed)).token_ids for seed in range(SEEDS)]
            same, pauses = 0, list[float]()
            for number in range(count):
                await stage.whole()
                service, hurt = HURTS[number % len(HURTS)]
                heard = await _answer(stage, f"hurt-{number}", number % SEEDS, service, hurt)
                same += heard.token_ids == wholes[number % SEEDS] and heard.finished
                if service == "target":
                    pauses.append(heard.pause)
            await asyncio.sleep(3)  # the sidecar waits a little before it writes a run
            violations = (
                await stage.bus.call("sidecar", "Status", StatusRequest(), StatusResponse, timeout=5)
            ).violation_count
        verdicts = [replay(read_run(Path(folder, "runs", f"hurt-{number}.jsonl"))) for number in range(count)]
    for number, verdict in enumerate(verdicts):
        if not verdict.accepted:
            print(f"hurt-{number}: {verdict.first}")
    accepted = sum(verdict.accepted for verdict in verdicts)
    p50, p99 = statistics.median(pauses), statistics.quantiles(pauses, n=100, method="inclusive")[98]
    case = f"{count} answers, SIGKILL or SIGSTOP of target or router"
    return [
        Row(
            "takeover",
            case,
            "answers identical to the undisturbed ones",
            same / count,
            "share",
            count,
            "1",
            same == count,
        ),
        Row("takeover", case, "runs accepted by TraceCommit", accepted / count, "share", count, "1", accepted == count),
        Row("takeover", case, "violations found while they ran", violations, "violations", count, "0", violations == 0),
        Row(
            "takeover", "a target is lost", "longest pause of the client, p50", p50, "s", len(pauses), "<= 2", p50 <= 2
        ),
        Row("takeover", "a target is lost", "longest pause of the client, p99", p99, "s", len(pauses)),
    ]


@asynccontextmanager
async def _stage(folder: Path) -> AsyncIterator[Stage]:
    config = stack_config(folder, "target.processes=2", "sidecar.record=true")
    services = {name: service_command(name) for name in SERVICES} | {"router-2": service_command("router")}
    async with Supervisor(config, services=services) as stack:
        bus = await Bus.connect(stack.nats_url, "benchmark")
        try:
            async with Registry(bus) as registry:
                yield Stage(stack, bus, Journal(bus), registry)
        finally:
            await bus.close()


async def _answer(
    stage: Stage, request_id: str, seed: int, service: str = "", hurt: signal.Signals | None = None
) -> Heard:
    """One answer, whoever is hurt; a stopped process is woken when it has been read to its end."""
    heard, victim = Heard([]), 0
    async with asyncio.timeout(120):
        for turn in range(20):
            name = ROUTERS[turn % len(ROUTERS)]
            async with Client(stage.stack.address(name), reconnects=0) as client:
                stream = (
                    client.resume(request_id, len(heard.token_ids))
                    if heard.token_ids
                    else client.generate(
                        PROMPT,
                        request_id=request_id,
                        max_tokens=LENGTH,
                        ignore_eos=True,
                        temperature=0.7,
                        seed=seed,
                        on_disconnect="continue",
                    )
                )
                try:
                    while True:
                        event = await asyncio.wait_for(anext(stream), SILENCE_S)
                        if isinstance(event, Finished):
                            heard.finished = True
                            break
                        if isinstance(event, Tokens):
                            heard.tokens(event)
                            if hurt is not None and not victim:
                                victim = (
                                    await stage.owner(request_id) if service == "target" else stage.stack.pid(name) or 0
                                )
                                os.kill(victim, hurt)
                except (CountersignError, TimeoutError, StopAsyncIteration):
                    await asyncio.sleep(0.2 if turn else 0)
                    continue  # to the other router
            break
    if hurt == signal.SIGSTOP:
        os.kill(victim, signal.SIGCONT)
    return heard
