"""What a pass costs by what is in it: decodes, prompt tokens, and the keys that they see.

Measured on the demo target, native code on one thread, and fitted by a line that the fleets of ``benchmarks/fleet.py``
are simulated with.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from countersign.cli.bench import CHECKOUT, Row
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.step import Span

TARGET: Path = CHECKOUT / "infra" / "models" / "demo-target"
# (decodes, prompt tokens) of a pass, and the tokens that each sequence has before it.
SHAPES = ((1, 0), (4, 0), (16, 0), (0, 64), (0, 256), (4, 256))
CONTEXTS = (16, 512, 1536)
NAMES = ("a pass with nothing in it", "a decode", "a prompt token", "a thousand keys that tokens see")


async def run(quick: bool) -> list[Row]:
    """The line, and how far the passes are from it."""
    measured = await asyncio.to_thread(measure, 3 if quick else 15)
    line = fit(measured)
    off = [abs(line_of(line, shape) / seconds - 1) for shape, seconds in measured]
    scales = (1e6, 1e6, 1e6, 1e9)
    case, n = "demo target, one thread, fp32", len(measured)
    rows = [
        Row("passes", case, name, value * scale, "us", n)
        for name, value, scale in zip(NAMES, line, scales, strict=True)
    ]
    return [*rows, Row("passes", case, "distance of a pass from the line, median", statistics.median(off), "share", n)]


Shape = tuple[int, int, float]


def fitted(quick: bool) -> Sequence[float]:
    """Seconds of a pass, a decode, a prompt token, a key."""
    return fit(measure(3 if quick else 15))


def measure(rounds: int) -> list[tuple[Shape, float]]:
    """Median seconds by (decodes, prompt tokens, keys that all of them see)."""
    model = load_model(TARGET)
    found = []
    for context in CONTEXTS:
        cache = PagedCache(model.config, model.dtype, tokens=20 * (context + 320))
        first = cache.sequence()
        model.forward(cache, [Span(first, [5] * context, 0)])
        for decodes, tokens in SHAPES:
            shape = (decodes, tokens, decodes * context + tokens * (context + tokens / 2))
            counts = [1] * decodes + [tokens] * (tokens > 0)
            found.append((shape, _seconds(model, cache, [first.fork() for _ in counts], counts, rounds)))
    return found


def _seconds(model: Model, cache: PagedCache, held: list[CachedSequence], counts: list[int], rounds: int) -> float:
    context, times = held[0].length, []
    for _ in range(rounds):
        spans = [Span(sequence, [7] * count, 1) for sequence, count in zip(held, counts, strict=True)]
        began = time.perf_counter()
        model.forward(cache, spans)
        times.append(time.perf_counter() - began)
        for sequence in held:
            sequence.truncate(context)
    for sequence in held:
        sequence.close()
    return statistics.median(times)


def fit(measured: Sequence[tuple[Shape, float]]) -> Sequence[float]:
    """The line with the least relative errors whose numbers are not negative."""
    matrix = np.array([[1.0, *shape] for shape, _ in measured]) / np.array([[seconds] for _, seconds in measured])
    best, chosen = float("inf"), np.zeros(4)
    for kept in itertools.product((False, True), repeat=4):
        columns = np.flatnonzero(kept)
        part, *_ = np.linalg.lstsq(matrix[:, columns], np.ones(len(matrix)), rcond=None)
        error = float(np.square(matrix[:, columns] @ part - 1).sum())
        if (part >= 0).all() and error < best:
            best, chosen = error, np.zeros(4)
            chosen[columns] = part
    return [float(each) for each in chosen]


def line_of(line: Sequence[float], shape: Shape) -> float:
    """Seconds of a pass by the line."""
    return line[0] + sum(each * count for each, count in zip(line[1:], shape, strict=True))
