"""What a step of the engine costs beside the model, what a long prompt does to those who decode, what invariance costs.

Runs the demo target in this process, native code on two threads. ``countersign bench engine`` runs this too.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from countersign.cli.bench import CHECKOUT, Row
from countersign.services.engine.engine import Engine, kept_of
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.step import Span

TARGET = CHECKOUT / "infra" / "models" / "demo-target"
THREADS = 2
REQUESTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BARS = {1: 0.3, 64: 1.0}
OVERHEAD = "per-step overhead outside the model"
TRIALS = 5


async def run(quick: bool) -> list[Row]:
    """Quick: fewer steps."""
    return await asyncio.to_thread(_run, 30 if quick else 200)


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draws the overhead over the number of requests."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for temperature in (0.0, 0.8):
        curve = [
            (int(row.case.split()[0]), row.value)
            for row in rows
            if row.metric == OVERHEAD and row.case.endswith(f"T {temperature}")
        ]
        axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=f"temperature {temperature}")
    for requests, limit in BARS.items():
        axes.plot([requests], [limit], marker="v", color="black", linestyle="none")
        axes.annotate(f"bar {limit} ms", (requests, limit), textcoords="offset points", xytext=(6, 4))
    axes.set(xscale="log", yscale="log", xlabel="requests decoding in one batch", ylabel="ms a step outside the model")
    axes.set_xticks(REQUESTS, [str(count) for count in REQUESTS])
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(frameon=False)
    axes.set_title("Scheduling, laying out, sampling's Python, acceptance, bookkeeping: median of a step", fontsize=10)
    file = folder / "engine-overhead.svg"
    figure.savefig(file)
    plt.close(figure)
    return [file]


def _run(steps: int) -> list[Row]:
    torch.set_num_threads(THREADS)
    model = load_model(TARGET, threads=THREADS)
    rows = [row for count in REQUESTS for row in _overhead(model, count, steps)]
    return [*rows, *_pause(model), *_invariance(model, steps)]


@dataclass(slots=True)
class Clock:
    """Seconds spent in native calls since it was last read."""

    spent: float = 0.0

    def around(self, call: Callable[..., object]) -> Callable[..., object]:
        """The call, timed."""

        def timed(*arguments: object) -> object:
            began = time.perf_counter()
            result = call(*arguments)
            self.spent += time.perf_counter() - began
            return result

        return timed


def _advance(engine: Engine) -> int:
    """One step; how many requests got tokens."""
    ran = engine.run(engine.plan())
    engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
    for result in ran.results:
        if len(result.generation.generated) == result.generation.max_tokens:
            engine.remove(result.generation.id)
    return len(ran.results)


def _overhead(model: Model, count: int, steps: int) -> list[Row]:
    """Step by step, what is not spent in the model's and the sampler's native code."""
    executor = model.executor
    if not isinstance(executor, NativeExecutor):
        return [Row("steps", f"{count} requests", f"{OVERHEAD}: no native code here", 0, "", 0)]
    rows = []
    library = executor.team.library
    cache = PagedCache(model.config, "fp32", count * (40 + steps + 16) + 1024)
    cache.pool.fill_(0)  # the system maps memory when it is first written; a server has done that
    original = library.program_run, library.sample
    for temperature in (0.0, 0.8):
        clock = Clock()
        vars(library).update(program_run=clock.around(original[0]), sample=clock.around(original[1]))
        try:
            engine = Engine.of(model, cache)
            for index in range(count):
                prompt = [(7 * index + place) % 4000 + 1 for place in range(40)]
                engine.submit(Generation(str(index), prompt, steps, Sampling(temperature, seed=index)))
            outside = []
            while len(engine):
                clock.spent, began = 0.0, time.perf_counter()
                if _advance(engine) == count:
                    outside.append(time.perf_counter() - began - clock.spent)
        finally:
            vars(library).update(program_run=original[0], sample=original[1])
        median = statistics.median(outside) * 1e3
        bar = BARS.get(count)
        limit, met = (None, None) if bar is None else (f"<= {bar} ms", median <= bar)
        case = f"{count} requests, T {temperature}"
        rows.append(Row("steps", case, OVERHEAD, median, "ms", len(outside), limit, met))
    return rows


def _pause(model: Model) -> list[Row]:
    """Eight decode; a prompt of 1,500 tokens comes. Gaps between a decoder's tokens, and the time to first token."""
    case = "a 1,500-token prompt while 8 decode"
    gaps, chunks, firsts, passes = [], [], [], 0
    for _ in range(TRIALS):
        engine = Engine.of(model, PagedCache(model.config, "fp32", 16_384))
        for index in range(8):
            engine.submit(Generation(str(index), [index * 50 + place + 1 for place in range(40)], 300))
        for _ in range(20):
            _advance(engine)
        long = Generation("long", [place % 4000 + 1 for place in range(1500)], 20)
        engine.submit(long)
        arrived = time.perf_counter()
        while not long.generated:
            began = time.perf_counter()
            served = _advance(engine)
            gaps.append(time.perf_counter() - began)
            passes = max(passes, 1 if served >= 8 else 2)
            chunks.append(gaps[-1])
        firsts.append(time.perf_counter() - arrived)
    gaps.sort()
    p99, longest = gaps[min(len(gaps) - 1, int(len(gaps) * 0.99))], max(chunks)
    n = len(gaps)
    return [
        Row("steps", case, "most passes between two tokens of a decoder", passes, "passes", n, "<= 1", passes <= 1),
        Row("steps", case, "gap between a decoder's tokens, p99", p99 * 1e3, "ms", n),
        Row("steps", case, "the longest chunk step", longest * 1e3, "ms", n),
        Row("steps", case, "time to first token of the prompt, median", statistics.median(firsts) * 1e3, "ms", TRIALS),
    ]


def _invariance(model: Model, steps: int) -> list[Row]:
    """Whole steps in native code, whose order of summation is fixed, beside torch's with and without a fixed order."""
    others = {
        "torch, free order": load_model(TARGET, backend="eager", numerics="fast"),
        "torch, fixed order": load_model(TARGET, backend="eager"),
    }
    shapes = {
        "decode, 1 x 1": (1, 1),
        "decode, 16 x 1": (16, 1),
        "verify, 16 x 5": (16, 5),
        "prefill, 1 x 256": (1, 256),
    }
    rows = []
    for case, (sequences, tokens) in shapes.items():
        times = _turns({"native": model, **others}, sequences, tokens, max(steps // 10, 5))
        fixed = times["native"]
        for name in others:
            cost = fixed / times[name] - 1
            bar, met = ("<= 0.15", cost <= 0.15) if name == "torch, free order" else (None, None)
            metric, ratio = f"cost of invariance: native beside {name}", times[name] / fixed
            rows.append(Row("steps", case, metric, cost, "share", steps // 10, bar, met, name, ratio))
        own = times["torch, fixed order"] / times["torch, free order"] - 1
        rows.append(Row("steps", case, "cost of a fixed order in torch", own, "share", steps // 10))
    return rows


def _turns(models: dict[str, Model], sequences: int, tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of a step of each model, turn by turn, over contexts of 200 tokens."""
    times: dict[str, list[float]] = {name: [] for name in models}
    prepared = {}
    for name, model in models.items():
        cache = PagedCache(model.config, "fp32", 16_384)
        held = [cache.sequence() for _ in range(sequences)]
        model.forward(cache, [Span(sequence, [5] * 200, 0) for sequence in held])
        prepared[name] = cache, held
    for _ in range(rounds):
        for name, model in models.items():
            cache, held = prepared[name]
            began = time.perf_counter()
            model.forward(cache, [Span(sequence, [7] * tokens, tokens) for sequence in held])
            times[name].append(time.perf_counter() - began)
            for sequence in held:
                sequence.truncate(200)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


if __name__ == "__main__":
    for row in _run(30):
        print(json.dumps({"case": row.case, "metric": row.metric, "value": row.value, "met": row.met}))
