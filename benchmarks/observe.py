"""What telemetry costs: whole stacks with all of it and with none, in turns.

All of it: spans (kept on this machine, as by default, or sent to a collector that does not answer) and metrics, which
somebody reads from every process each 5 seconds. None: neither.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from countersign.cli.bench import Row, stack_config
from countersign.cli.prompts import heldout_prompts
from countersign.cli.streams import first_token_s, throughput
from countersign.client import Client
from countersign.services.runtime.bus import Bus
from countersign.services.runtime.registry import Registry
from countersign.services.runtime.supervisor import SERVICES, Supervisor

NONE = ("telemetry.spans=false", "telemetry.metrics=false")
# Nobody listens there: reserved, and refused at once.
DOWN = ("telemetry.otlp_endpoint=http://127.0.0.1:1",)
# As infra/prometheus does.
SCRAPE_S = 5.0
SETTLE_S = 1.0
# Two equal stacks differ by up to a twentieth for as long as they run, the one that started first more often for the
# worse: many pairs are started, each in the other order than the one before.
PAIRS = 6
TURNS = 3
ANSWERS = 96
FIRST_TOKENS = 150
FIRST_WARM = 5


@dataclass(frozen=True, slots=True)
class Pair:
    """Two stacks that differ in their telemetry."""

    on: Supervisor
    off: Supervisor
    prompts: Sequence[str]


async def run(quick: bool) -> list[Row]:
    """Throughput at 16 streams, time to the first token, and a collector that is down."""
    pairs, turns, answers, firsts = (2, 1, 16, 10) if quick else (PAIRS, TURNS, ANSWERS, FIRST_TOKENS)
    speeds, took = list[tuple[float, float]](), list[tuple[float, float]]()
    for number in range(pairs):
        async with _pair((), on_first=number % 2 == 0) as pair:
            speeds += await _throughput(pair, turns, answers)
            took += await _first_tokens(pair, firsts)
    rows = _throughput_rows(f"spans kept here, {pairs} pairs of stacks", answers, speeds)
    rows += _first_token_rows(f"spans kept here, {pairs} pairs of stacks", took)
    down, grown = list[tuple[float, float]](), list[int]()
    for number in range(pairs // 2):
        async with _pair(DOWN, on_first=number % 2 == 0) as pair:
            before = _resident(pair.on), _resident(pair.off)
            down += await _throughput(pair, turns, answers)
            grown.append(_growth(pair, before))
    rows += _throughput_rows(f"collector down, {pairs // 2} pairs of stacks", answers, down)
    rows.append(_growth_row((turns + 1) * answers, grown))
    return rows


@asynccontextmanager
async def _pair(settings: Sequence[str], *, on_first: bool) -> AsyncIterator[Pair]:
    with tempfile.TemporaryDirectory() as told, tempfile.TemporaryDirectory() as silent:
        on, off = stack_config(told, *settings), stack_config(silent, *NONE)
        prompts = [prompt.text for prompt in heldout_prompts(on.target.model.parent, 16)]
        async with Supervisor(on if on_first else off) as first, Supervisor(off if on_first else on) as second:
            one, other = (first, second) if on_first else (second, first)
            reading = asyncio.create_task(_read_metrics(one.nats_url))
            try:
                yield Pair(one, other, prompts)
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


async def _read_metrics(nats: str) -> None:
    """As Prometheus does."""
    bus = await Bus.connect(nats, "bench")
    registry = Registry(bus)
    await registry.start()
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(SCRAPE_S)) as session:
            while True:
                for name in SERVICES:
                    for instance in registry.live(name):
                        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                            async with session.get(f"http://{instance.metrics_address}/metrics") as reply:
                                await reply.read()
                await asyncio.sleep(SCRAPE_S)
    finally:
        await registry.stop()
        await bus.close()


async def _throughput(pair: Pair, turns: int, answers: int) -> list[tuple[float, float]]:
    """Tokens a second with telemetry and without, turn by turn."""
    speeds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(turns + 1):
        for on in (True, False) if turn % 2 else (False, True):
            stack = pair.on if on else pair.off
            speed = await throughput(stack.router_address, pair.prompts, answers)
            await asyncio.sleep(SETTLE_S)  # what is still to be written must not slow the other
            if turn:  # the first warms up
                speeds[on].append(speed)
    return list(zip(speeds[True], speeds[False], strict=True))


def _throughput_rows(case: str, answers: int, speeds: Sequence[tuple[float, float]]) -> list[Row]:
    cost = 1 - statistics.median(one / other for one, other in speeds)
    what = f"16 streams, {answers} answers of 64 tokens, metrics read each 5 seconds, {case}"
    speed, turns = statistics.median(one for one, _ in speeds), len(speeds)
    return [
        Row("observe", what, "throughput", speed, "tokens/s", turns, peer="no telemetry", ratio=1 - cost),
        Row("observe", what, "throughput that telemetry takes", cost, "share", turns, "<= 0.03", cost <= 0.03),
    ]


async def _first_tokens(pair: Pair, count: int) -> list[tuple[float, float]]:
    """Seconds with telemetry and without: one request at a time, at one stack and then at the other. Of short prompts,
    whose first token comes soon, so that what comes on top of it is seen.
    """
    took: dict[bool, list[float]] = {True: [], False: []}
    async with Client(pair.on.router_address) as one, Client(pair.off.router_address) as other:
        for number in range(count + FIRST_WARM):
            for on in (True, False) if number % 2 else (False, True):
                took[on].append(await first_token_s(one if on else other, f"# {number}\ndef f("))
    return list(zip(took[True], took[False], strict=True))[FIRST_WARM:]


def _first_token_rows(where: str, took: Sequence[tuple[float, float]]) -> list[Row]:
    more = 1e3 * statistics.median(with_ - without for with_, without in took)
    case = f"short prompts one at a time, {where}"
    first = 1e3 * statistics.median(with_ for with_, _ in took)
    return [
        Row("observe", case, "time to first token, median", first, "ms", len(took)),
        Row("observe", case, "time to first token that telemetry adds", more, "ms", len(took), "<= 0.2", more <= 0.2),
    ]


def _growth(pair: Pair, before: tuple[int, int]) -> int:
    """Bytes that the stack took while the collector was down, beyond what the other took for the same answers."""
    return (_resident(pair.on) - before[0]) - (_resident(pair.off) - before[1])


def _growth_row(answers: int, grown: Sequence[int]) -> Row:
    metric, most = f"memory of all processes after {answers} answers, worst", max(grown) / 2**20
    return Row("observe", "collector down", metric, most, "MiB", len(grown))


def _resident(stack: Supervisor) -> int:
    """Bytes, of a kernel that tells (Linux)."""
    pids = [pid for name in SERVICES if (pid := stack.pid(name)) is not None]
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))
