"""What telemetry costs: stacks whose processes have all of it and none, in turns.

All of it: spans (kept on this machine, as by default, or sent to a collector that does not answer) and metrics, which
somebody reads from every process each 5 seconds. None: neither. It is switched in one and the same stack
(programs/switchable_service.py): two that should be equal differ by a twentieth for as long as they run.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path

import aiohttp
import psutil

from countersign.cli.bench import Row, stack_config
from countersign.cli.prompts import heldout_prompts
from countersign.cli.streams import first_token_s, throughput
from countersign.client import Client
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.supervisor import SERVICES, Supervisor

PROGRAM = Path(__file__).parent / "programs" / "switchable_service.py"
# Nobody listens there: reserved, and refused at once.
DOWN = ("telemetry.otlp_endpoint=http://127.0.0.1:1",)
# As infra/prometheus does.
SCRAPE_S = 5.0
# Spans are written each second: what is still to be written must not slow the next turn.
SETTLE_S = 1.3
SWITCH_S = 0.05
STACKS = 4
TURNS = 6
ANSWERS = 160
FIRST_TURNS = 8
FIRST_TOKENS = 30


@dataclass(frozen=True, slots=True)
class Stage:
    """One stack, whose telemetry can be on or off."""

    stack: Supervisor
    prompts: Sequence[str]
    read: asyncio.Event  # set: its metrics are read

    async def switch(self, on: bool) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGUSR1 if on else signal.SIGUSR2)
        (self.read.set if on else self.read.clear)()
        await asyncio.sleep(SWITCH_S)

    @property
    def pids(self) -> list[int]:
        return [pid for name in SERVICES if (pid := self.stack.pid(name)) is not None]

    def processor_s(self) -> float:
        """Used by all processes until now."""
        used = [psutil.Process(pid).cpu_times() for pid in self.pids]
        return sum(each.user + each.system for each in used)

    def resident(self) -> int:
        """Bytes of all processes."""
        return sum(psutil.Process(pid).memory_info().rss for pid in self.pids)


@dataclass(slots=True)
class Costs:
    """What the turns with telemetry took, over those without."""

    speeds: list[float] = field(default_factory=list)  # tokens a second, with
    slower: list[float] = field(default_factory=list)  # shares of throughput, a pair of turns each
    busier: list[float] = field(default_factory=list)  # shares of the processor's time
    grown: list[int] = field(default_factory=list)  # bytes of all processes, a stack each


async def run(quick: bool) -> list[Row]:
    """Throughput at 16 streams, time to the first token, and a collector that is down."""
    stacks, turns, answers = (1, 1, 16) if quick else (STACKS, TURNS, ANSWERS)
    first_turns, firsts = (1, 10) if quick else (FIRST_TURNS, FIRST_TOKENS)
    costs, down, first, later = Costs(), Costs(), list[float](), list[float]()
    for _ in range(stacks):
        async with staged() as stage:
            await _throughput(stage, turns, answers, costs)
            one, other = await _first_tokens(stage, first_turns, firsts)
            first += one
            later += other
    for _ in range((stacks + 1) // 2):
        async with staged(*DOWN) as stage:
            await _throughput(stage, turns, answers, down)
    rows = _throughput_rows(f"spans kept here, {stacks} stacks", answers, costs)
    rows += _first_token_rows(f"{firsts} each turn, {stacks} stacks", first, later)
    rows += _throughput_rows(f"collector down, {len(down.grown)} stacks", answers, down)
    metric = f"memory that {turns * answers} answers take, beyond as many without telemetry, worst"
    return [*rows, Row("observe", "collector down", metric, max(down.grown) / 2**20, "MiB", len(down.grown))]


@asynccontextmanager
async def staged(*settings: str) -> AsyncIterator[Stage]:
    with tempfile.TemporaryDirectory() as folder:
        config = stack_config(folder, *settings)
        prompts = [prompt.text for prompt in heldout_prompts(config.target.model.parent, 16)]
        services = {name: [sys.executable, "-P", str(PROGRAM), name] for name in SERVICES}
        async with Supervisor(config, services=services) as stack:
            stage = Stage(stack, prompts, asyncio.Event())
            reading = asyncio.create_task(_read_metrics(stage))
            try:
                yield stage
            finally:
                reading.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await reading  # metrics that nobody read would cost nothing: what went wrong is told


async def _read_metrics(stage: Stage) -> None:
    """As Prometheus does."""
    async with (
        await Bus.connect(stage.stack.nats_url, "bench") as bus,
        Registry(bus) as registry,
        aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(SCRAPE_S)) as session,
    ):
        while await stage.read.wait():
            for instance in registry.everybody():
                with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                    async with session.get(f"http://{instance.metrics_address}/metrics") as reply:
                        await reply.read()
            await asyncio.sleep(SCRAPE_S)


async def _throughput(stage: Stage, turns: int, answers: int, costs: Costs) -> None:
    """Turn by turn. Processor's time goes on until all spans are written."""
    grown = 0
    for turn in range(turns + 1):
        speed, used = dict[bool, float](), dict[bool, float]()
        for on in (True, False) if turn % 2 else (False, True):
            await stage.switch(on)
            before, size = stage.processor_s(), stage.resident()
            speed[on] = await throughput(stage.stack.router_address, stage.prompts, answers)
            await asyncio.sleep(SETTLE_S)
            used[on] = stage.processor_s() - before
            if turn:
                grown += (stage.resident() - size) * (1 if on else -1)
        if turn:  # the first warms up
            costs.speeds.append(speed[True])
            costs.slower.append(1 - speed[True] / speed[False])
            costs.busier.append(used[True] / used[False] - 1)
    costs.grown.append(grown)


def _throughput_rows(case: str, answers: int, costs: Costs) -> list[Row]:
    what = f"16 streams, {answers} answers of 64 tokens, metrics read each 5 seconds, {case}, on and off in turns"
    cost, turns = statistics.fmean(costs.slower), len(costs.slower)
    speed, busier = statistics.median(costs.speeds), statistics.fmean(costs.busier)
    return [
        Row("observe", what, "throughput", speed, "tokens/s", turns, peer="no telemetry", ratio=1 - cost),
        Row("observe", what, "throughput that telemetry takes", cost, "share", turns, "<= 0.03", cost <= 0.03),
        Row("observe", what, "throughput that telemetry takes, standard error", _error(costs.slower), "share", turns),
        Row("observe", what, "processor's time that telemetry takes", busier, "share", turns),
        Row("observe", what, "processor's time, standard error", _error(costs.busier), "share", turns),
    ]


async def _first_tokens(stage: Stage, turns: int, count: int) -> tuple[list[float], list[float]]:
    """Medians of seconds with telemetry, and by how much they are more than without, turn by turn. One request at a
    time, of short prompts, whose first token comes soon, so that what comes on top of it is seen.
    """
    with_, more = list[float](), list[float]()
    async with Client(stage.stack.router_address) as client:
        for turn in range(turns + 1):
            took = dict[bool, float]()
            for on in (True, False) if turn % 2 else (False, True):
                await stage.switch(on)
                prompts = [f"# {turn} {number} {on:d}\ndef f(" for number in range(count)]
                took[on] = statistics.median([await first_token_s(client, prompt) for prompt in prompts])
                await asyncio.sleep(SETTLE_S)
            if turn:
                with_.append(took[True])
                more.append(took[True] - took[False])
    return with_, more


def _first_token_rows(where: str, took: Sequence[float], later: Sequence[float]) -> list[Row]:
    more, turns = 1e3 * statistics.fmean(later), len(later)
    case = f"short prompts one at a time, spans kept here, {where}, on and off in turns"
    return [
        Row("observe", case, "time to first token, median", 1e3 * statistics.median(took), "ms", turns),
        Row("observe", case, "time to first token that telemetry adds", more, "ms", turns, "<= 0.2", more <= 0.2),
        Row("observe", case, "time that telemetry adds, standard error", 1e3 * _error(later), "ms", turns),
    ]


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0
