"""Prefill apart from decode: what it costs and spares on the real stack, and in which fleets it would pay.

Measured: two stacks of two targets each, one of them split (one target for prompts, one that answers), in turns. Then
the fleets of ``benchmarks/fleet.py``, at the passes and the handover that were measured.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from countersign.cli.bench import Row, load, stack_config
from countersign.client import Client, Finished, Tokens
from countersign.services.runtime.supervisor import Supervisor

SPLIT, UNSPLIT = "split", "unsplit"
# So few that all of it is in use after WARM_UPS turns: the system maps memory when it is first written, which takes
# longer than what is written, and a server has done that.
CACHE = "target.cache_tokens=8192"
WARM_UPS = 4
SETTINGS = {
    SPLIT: ("target.processes=1", "target.role=decode", "target.prefill_processes=1"),
    UNSPLIT: ("target.processes=2",),
}
LENGTHS = (600, 1900)
GOODPUT = "goodput of pools"
FLEET: Any = load("fleet")
PASSES: Any = load("passes")


async def run(quick: bool) -> list[Row]:
    """The stacks, then the fleets."""
    with tempfile.TemporaryDirectory() as folder:
        async with _stacks(Path(folder)) as routers:
            alone = await _alone(routers, 3 if quick else 30)
            busy = await _beside(routers, 1 if quick else 8)
    rows = [*_alone_rows(alone), *busy]
    cost = await asyncio.to_thread(lambda: FLEET.Cost(*PASSES.fitted(quick)))
    cost = replace(cost, **_handover(alone))
    rows += _simulated(cost, alone)
    return [*rows, *await asyncio.to_thread(_fleets, cost, quick)]


# The real stack


@asynccontextmanager
async def _stacks(folder: Path) -> AsyncIterator[dict[str, str]]:
    """Routers' addresses."""
    configs = {name: stack_config(folder / name, CACHE, *settings) for name, settings in SETTINGS.items()}
    async with Supervisor(configs[SPLIT]) as one, Supervisor(configs[UNSPLIT]) as other:
        yield {SPLIT: one.router_address, UNSPLIT: other.router_address}


@dataclass(slots=True)
class Times:
    """Of answers to prompts of one length at one stack, in seconds: until the first token, then until the second."""

    first: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    stored: list[int] = field(default_factory=list)


Measured = dict[tuple[str, int], Times]


async def _alone(routers: dict[str, str], turns: int) -> Measured:
    """One request at a time, at the stacks in turns; each prompt is new."""
    found: Measured = {(name, length): Times() for name in routers for length in LENGTHS}
    async with Client(routers[SPLIT]) as split, Client(routers[UNSPLIT]) as unsplit:
        clients = {SPLIT: split, UNSPLIT: unsplit}
        for turn, length, name in itertools.product(range(turns + WARM_UPS), LENGTHS, routers):
            arrivals, cached = await _arrivals(clients[name], prompt_of(turn, length))
            if turn >= WARM_UPS:
                times = found[name, length]
                times.first.append(arrivals[0])
                times.second.append(arrivals[1] - arrivals[0])
                times.stored.append(cached)
    return found


async def _arrivals(client: Client, prompt: list[int]) -> tuple[list[float], int]:
    """When an answer's first tokens came, from the call on, and how many of the prompt's were stored."""
    began, arrivals, cached = time.perf_counter(), list[float](), 0
    async for event in client.generate(prompt, max_tokens=8, ignore_eos=True, drafting="off", tenant=str(prompt[0])):
        if isinstance(event, Tokens):
            arrivals += [time.perf_counter() - began] * len(event.tokens)
        elif isinstance(event, Finished):
            cached = event.usage.cached_prompt_tokens
    return arrivals, cached


def prompt_of(number: int, length: int) -> list[int]:
    """No two begin alike."""
    return [3 + number, 3 + length, *(3 + (number + place * place) % 4000 for place in range(length - 2))]


def _alone_rows(found: Measured) -> list[Row]:
    rows = []
    for length in LENGTHS:
        split, unsplit = found[SPLIT, length], found[UNSPLIT, length]
        case, n = f"a prompt of {length} tokens, alone", len(split.first)
        for name, one, other in (("first", split.first, unsplit.first), ("second", split.second, unsplit.second)):
            value, ratio = statistics.median(one), statistics.median(one) / statistics.median(other)
            bar, met = ("<= 1.2x unsplit", ratio <= 1.2) if name == "second" else (None, None)
            metric = f"{name} token after the {'call' if name == 'first' else 'first'}, p50"
            rows.append(Row("split", case, metric, value * 1e3, "ms", n, bar, met, peer=UNSPLIT, ratio=ratio))
        blocks = statistics.median(split.stored) / length
        rows.append(Row("split", case, "share of the prompt that came through the store", blocks, "share", n))
    return rows


def _handover(found: Measured) -> dict[str, float]:
    """What a split adds to the first token, as a line over the prompt's length; nothing is below 0."""
    short, long = (
        statistics.median(found[SPLIT, length].first) - statistics.median(found[UNSPLIT, length].first)
        for length in LENGTHS
    )
    token = max(0.0, (long - short) / (LENGTHS[1] - LENGTHS[0]))
    return {"handover": max(0.0, short - token * LENGTHS[0]), "token": token}


def _simulated(cost: Any, found: Measured) -> list[Row]:
    """How far the simulated machines are from the real ones, where nobody else is served. They know of passes and the
    handover only, and nothing of what router, log and client take.
    """
    rows = []
    for (name, length), times in found.items():
        request = FLEET.Request(0.0, length, 8)
        FLEET.Fleet(cost, 2, name, prefill=1, budget=256).serve([request])
        for what, simulated, measured in (
            ("first token", request.ttft, statistics.median(times.first)),
            ("second token", request.gap, statistics.median(times.second)),
        ):
            metric, ratio = f"{what} as simulated, {name}", simulated / measured
            case = f"a prompt of {length} tokens, alone"
            rows.append(Row("split", case, metric, simulated * 1e3, "ms", 1, peer="measured", ratio=ratio))
    return rows


async def _beside(routers: dict[str, str], turns: int) -> list[Row]:
    """What prompts of the longer length do to eight answers that are being given: gaps between their tokens."""
    gaps: dict[str, list[float]] = {name: [] for name in routers}
    for turn, name in itertools.product(range(turns), routers):
        async with Client(routers[name]) as client:
            begun = [asyncio.Event() for _ in range(8)]
            answers = [asyncio.create_task(_gaps(client, 500 + 10 * turn + n, each)) for n, each in enumerate(begun)]
            await asyncio.gather(*(each.wait() for each in begun))
            for number in range(4):
                await _arrivals(client, prompt_of(700 + 10 * turn + number, LENGTHS[1]))
            for answer in answers:
                gaps[name] += await answer
    case = "eight answers while four long prompts come"
    rows = []
    for share in (0.5, 0.99):
        split, unsplit = (_quantile(gaps[name], share) for name in (SPLIT, UNSPLIT))
        n, ratio = len(gaps[SPLIT]), split / unsplit
        rows.append(
            Row("split", case, f"gap between tokens, p{100 * share:g}", split * 1e3, "ms", n, peer=UNSPLIT, ratio=ratio)
        )
    return rows


async def _gaps(client: Client, number: int, begun: asyncio.Event) -> list[float]:
    """Seconds between the pieces of one long answer."""
    arrivals: list[float] = []
    async for event in client.generate(prompt_of(number, 32), max_tokens=600, ignore_eos=True, drafting="off"):
        if isinstance(event, Tokens):
            arrivals.append(time.perf_counter())
            begun.set()
    return [later - before for before, later in itertools.pairwise(arrivals)]


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


# The fleets

# How much more a pass costs before its first token than here: on a CPU little comes with a pass itself, on a GPU
# reading the weights does, for which the first hundreds of tokens are free.
BASES = (1.0, 30.0)
OUTPUTS = (1, 8, 64, 512)
# What an answer's mean gap between tokens may be, in gaps of a machine without load: strict, to as good as anything.
SLACKS = (1.5, 3.0, 6.0, 12.0, 50.0, 1000.0)


def _fleets(cost: Any, quick: bool) -> list[Row]:
    size = FLEET.QUICK if quick else FLEET.WHOLE
    rows = [replace(row, bench="split") for row in FLEET.goodputs(cost, size)]
    rows += _sizes(cost, size, (2, 16) if quick else (2, 4, 16, 64, 256, 1000))
    for slow in BASES:
        slower = replace(cost, base=cost.base * slow)
        name = f"passes cost {slow:g}x to begin"
        plain = FLEET.Trial(slower, FLEET.CONVERSATION, size.machines, "unsplit", each=size.each)
        answers = [(each, replace(plain, load=FLEET.Load("", 1500, each))) for each in OUTPUTS]
        gaps = [(each, replace(plain, gap_slack=each)) for each in SLACKS]
        case = f"{name}; prompts of 1500 tokens, gaps up to {plain.gap_slack:g}x"
        rows += _curve(case, "answers of", "tokens", answers, size)
        rows += _curve(f"{name}; conversation", "gaps up to", "x unloaded", gaps, size)
    return rows


def _sizes(cost: Any, size: Any, fleets: Sequence[int]) -> list[Row]:
    """Latency and throughput over the number of machines, at four fifths of what unsplit ones can take."""
    rows = []
    for mix in (FLEET.CODE, FLEET.CONVERSATION):
        best = [FLEET.Trial(cost, mix, size.machines, each, each=size.each).best(size.steps) for each in FLEET.POLICIES]
        rate = 0.8 * best[0][1]
        for machines, (trial, _) in itertools.product(fleets, best):
            # Of a thousand machines ten requests each tell enough.
            result = replace(trial.scaled(machines), each=max(10, min(trial.each, 4000 // machines))).at(rate)
            case, n = f"{mix.name}, {machines} machines, {trial.policy}", len(result.requests)
            rows.append(Row("split", case, "throughput", result.tokens_per_second, "tokens/s", n))
            for share in (0.5, 0.99):
                times = {"first token": result.ttft, "gap": result.gap, "mean gap of an answer": result.mean_gap}
                for name, of in times.items():
                    rows.append(Row("split", case, f"{name}, p{100 * share:g}", of(share) * 1e3, "ms", n))
    return rows


def _curve(case: str, axis: str, unit: str, trials: Sequence[tuple[float, Any]], size: Any) -> list[Row]:
    """Goodput of pools beside unsplit machines along an axis, and where they break even."""
    rows, ratios, n = [], [], size.machines * size.each
    for x, trial in trials:
        plain, (_, split) = trial.goodput(size.steps), replace(trial, policy="pools").best(size.steps)
        ratios.append(split / plain if plain else 100.0)
        metric = f"{GOODPUT}, {axis} {x:g}"
        rows.append(Row("split", case, metric, split, "requests/s/machine", n, peer=UNSPLIT, ratio=ratios[-1]))
    at = break_even([x for x, _ in trials], ratios)
    rows += [Row("split", case, f"breaks even at {axis}", each, unit, len(trials)) for each in at]
    if not at:
        verdict = "pays" if ratios[0] > 1 else "does not pay"
        rows.append(Row("split", case, f"{verdict} at all {axis}; the best ratio", max(ratios), "x", len(trials)))
    return rows


def break_even(xs: Sequence[float], ratios: Sequence[float]) -> list[float]:
    """Where a curve of ratios passes 1, along the logarithm of x."""
    found = []
    for (x, before), (later, after) in itertools.pairwise(zip(xs, ratios, strict=True)):
        if (before > 1) != (after > 1):
            share = (1 - before) / (after - before)
            found.append(float(x * (later / x) ** share))
    return found


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Latency and throughput over the number of machines; goodput over the length of answers."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []
    metrics = ("throughput", "first token, p50", "first token, p99", "gap, p99", "mean gap of an answer, p99")
    for mix in ("code", "conversation"):
        figure, panels = plt.subplots(1, len(metrics), figsize=(18, 3.6), layout="constrained")
        for axes, metric in zip(panels, metrics, strict=True):
            for policy in FLEET.POLICIES:
                cases = [(row.case.split(", "), row) for row in rows if row.metric == metric]
                curve = [(int(case[1].split()[0]), row.value) for case, row in cases if case[::2] == [mix, policy]]
                axes.plot(*zip(*curve, strict=True), marker="o", markersize=3, label=policy)
            axes.set(xscale="log", yscale="log", xlabel="machines", title=metric)
            axes.set_xticks([x for x, _ in curve], [str(x) for x, _ in curve])
            axes.minorticks_off()
            axes.grid(visible=True, alpha=0.25)
        panels[0].set_ylabel("tokens/s")
        panels[1].set_ylabel("ms")
        panels[0].legend(frameon=False)
        drawn.append(folder / f"split-{mix}.svg")
        figure.savefig(drawn[-1], metadata={"Date": None})
        plt.close(figure)
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    lines = [row for row in rows if row.metric.startswith(GOODPUT) and row.ratio is not None]
    for axes, axis in zip(panels, ("answers of", "gaps up to"), strict=True):
        for case in dict.fromkeys(row.case for row in lines if axis in row.metric):
            points = [(float(row.metric.split()[-1]), row.ratio or 0.0) for row in lines if row.case == case]
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=case)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=axis, ylabel="goodput, pools / unsplit")
        axes.legend(frameon=False, fontsize=7)
    drawn.append(folder / "split-crossing.svg")
    figure.savefig(drawn[-1], metadata={"Date": None})
    plt.close(figure)
    return drawn
