"""Attention over ranks: bytes beside formulas, balance, the price of bits that know no ranks, and the cost model.

Ranks are threads of this process with one torch thread each. This says nothing of GPUs: the pictures of those are the
model's (``kernels/ring/cost.py``), whose predictions for this machine stand beside what was measured.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from countersign.cli.bench import Row
from countersign.kernels.ring import cost, traffic
from countersign.kernels.ring.execute import attend_over_ranks
from countersign.kernels.ring.layout import Extent, Layout, Piece, lay_out
from countersign.kernels.ring.local import Reference
from countersign.kernels.ring.partition import zigzag
from countersign.kernels.ring.schedule import Schedule, plan
from countersign.kernels.ring.threads import run_ranks
from countersign.kernels.ring.transport import Counted, Transport

HEADS, DIM, TOKENS, LEAF = 8, 64, 2048, 64
WAYS: dict[cost.Way, Schedule] = {"ring": Schedule.PASS_KV, "token-ring": Schedule.TOKEN_RING}
CORES = 2


async def run(quick: bool) -> list[Row]:
    """Quick: 2 ranks, one round."""
    return await asyncio.to_thread(_run, (2,) if quick else (2, 4, 8), 1 if quick else 5)


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """The model for GPUs, and balance and model against measurement here."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, panels = plt.subplots(1, len(cost.CASES), figsize=(12, 4), sharey=True, layout="constrained")
    for axes, (name, case) in zip(panels, cost.CASES.items(), strict=True):
        for link, machine in cost.LINKS.items():
            times = [
                (cost.seconds("ring", case, n, machine), cost.seconds("token-ring", case, n, machine))
                for n in cost.RANKS
            ]
            axes.plot(cost.RANKS, [ring / token for ring, token in times], marker="o", markersize=3, label=link)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel="GPUs", title=name)
        axes.title.set_fontsize(9)
        axes.set_xticks(cost.RANKS, [str(n) for n in cost.RANKS])
        axes.minorticks_off()
        axes.grid(visible=True, alpha=0.25)
    panels[0].set_ylabel("Ring time / TokenRing time")
    panels[0].set_yticks([0.125, 0.25, 0.5, 1, 2, 4, 8], ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    panels[0].legend(frameon=False, fontsize=8)
    first = folder / "ring-model.svg"
    figure.savefig(first, metadata={"Date": None})
    measured = [(row.value, row.ratio) for row in rows if row.metric.startswith("attention") and row.ratio is not None]
    second = folder / "ring-measured.svg"
    figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
    axes.scatter([value for value, _ in measured], [value * ratio for value, ratio in measured], s=16)
    most = max((value for value, _ in measured), default=1) * 1.2
    axes.plot([0, most], [0, most], color="black", linewidth=0.8)
    axes.set(xlabel="measured, ms", ylabel="predicted, ms", title="threads of one process, 2 cores")
    axes.grid(visible=True, alpha=0.25)
    figure.savefig(second, metadata={"Date": None})
    return [first, second]


def _run(sizes: tuple[int, ...], rounds: int) -> list[Row]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        machine = _calibrated(rounds)
        rows: list[Row] = []
        for kv_heads in (HEADS, 1):
            for size in sizes:
                rows += _bytes(size, kv_heads)
                rows += _times(size, kv_heads, machine, rounds)
        errors = [abs(row.ratio - 1) for row in rows if row.ratio is not None]
        rows.append(
            Row(
                "ring", "cost model", "median error of its predictions", statistics.median(errors), "share", len(errors)
            )
        )
        return [*rows, *_balance(), *_invariance(sizes)]
    finally:
        torch.set_num_threads(before)


def _layout(size: int, leaf: int | None = None) -> Layout:
    return lay_out([Extent(0, TOKENS)], size, leaf=leaf)


def _attend(layout: Layout, schedule: Schedule, kv_heads: int) -> tuple[list[int], float]:
    """(bytes sent by each rank, seconds)."""
    generator, tokens = torch.Generator().manual_seed(0), layout.extents[0].new
    q = torch.randn(tokens, HEADS, DIM, generator=generator)
    k, v = (torch.randn(tokens, kv_heads, DIM, generator=generator) for _ in range(2))
    programs = [plan(schedule, layout, rank) for rank in range(layout.size)]
    local = Reference(layout, DIM**-0.5)

    def one(transport: Transport) -> int:
        program, counted = programs[transport.rank], Counted(transport)
        rows = torch.cat([torch.arange(part.first, part.end) for part in program.rows])
        slots = torch.cat([torch.arange(part.first, part.end) for part in program.slots])
        attend_over_ranks(program, q[rows], k[slots], v[slots], counted, local, timeout=120)
        return sum(counted.sent.values())

    began = time.perf_counter()
    sent = run_ranks(layout.size, one)
    return sent, time.perf_counter() - began


def _bytes(size: int, kv_heads: int) -> list[Row]:
    """What each rank sent, beside the formula; the worst rank is reported."""
    shape, held = traffic.Shape(HEADS, kv_heads, DIM, 4), zigzag(0, TOKENS, size)
    expected: dict[str, Callable[[int], int]] = {
        "ring": lambda rank: traffic.zigzag_pass_kv(held, rank, shape),
        "token-ring": lambda rank: sum(traffic.zigzag_token_ring(held, rank, shape)),
    }
    rows = []
    for way, schedule in WAYS.items():
        sent, _ = _attend(_layout(size), schedule, kv_heads)
        wanted = [expected[way](rank) for rank in range(size)]
        difference = max(abs(a - b) for a, b in zip(sent, wanted, strict=True))
        case = f"{size} ranks, {HEADS} heads on {kv_heads}, {way}, {TOKENS} tokens causal"
        rows.append(Row("ring", case, "bytes sent by the busiest rank", max(sent), "bytes", 1))
        bar, met = "= formula", difference == 0
        rows.append(Row("ring", case, "difference from the formula, any rank", difference, "bytes", size, bar, met))
    return rows


def _times(size: int, kv_heads: int, machine: cost.Machine, rounds: int) -> list[Row]:
    rows = []
    layout = _layout(size)
    for way, schedule in WAYS.items():
        took = statistics.median(_attend(layout, schedule, kv_heads)[1] for _ in range(rounds))
        predicted = cost.planned(_work(layout, schedule), machine)
        name = f"{size} ranks, {HEADS} heads on {kv_heads}, {way}, {TOKENS} tokens causal"
        metric = f"attention; the model says {predicted * 1e3:.1f} ms"
        rows.append(Row("ring", name, metric, took * 1e3, "ms", rounds, ratio=predicted / took))
    return rows


def _work(layout: Layout, schedule: Schedule) -> list[list[float]]:
    """Multiply-adds of each step and rank, those that a mask throws away included."""
    programs = [plan(schedule, layout, rank) for rank in range(layout.size)]
    steps = zip(*(program.steps for program in programs), strict=True)
    return [[2.0 * HEADS * DIM * sum(map(_pairs, step.compute)) for step in ranks] for ranks in steps]


def _pairs(piece: Piece) -> int:
    return len(piece.rows) * sum(len(part) for part in piece.keys)


def _calibrated(rounds: int) -> cost.Machine:
    """The rate from one rank that attends to everything; the overhead is what two tiny ranks cost."""
    whole, tiny = _layout(1), lay_out([Extent(0, 32)], 2)
    took = min(_attend(whole, Schedule.TOKEN_RING, HEADS)[1] for _ in range(rounds + 2))
    rate = sum(map(sum, _work(whole, Schedule.TOKEN_RING))) / took
    idle = min(_attend(tiny, Schedule.TOKEN_RING, HEADS)[1] for _ in range(rounds + 2))
    return cost.Machine(rate, 8e9, 0.0, "switch", CORES, idle / 3)


def _balance() -> list[Row]:
    worst = 0.0
    for size in range(2, 9):
        for length in (1024, 1025, 1100, 1283, 2000, 4099):
            work = [
                sum((length - position) for part in ranges for position in range(part.first, part.end))
                for ranges in zigzag(0, length, size)
            ]
            worst = max(worst, max(work) / statistics.mean(work) - 1)
    return [
        Row(
            "ring",
            "zigzag, 2 to 8 ranks, 1,024 to 4,099 tokens",
            "busiest rank above the mean",
            worst,
            "share",
            42,
            "<= 0.01",
            worst <= 0.01,
        )
    ]


def _invariance(sizes: tuple[int, ...]) -> list[Row]:
    """Partials by node beside one a rank: the price of the same bits at every number of ranks."""
    rows = []
    for size in sizes:
        fast, exact = (max(_attend(_layout(size, leaf), Schedule.TOKEN_RING, HEADS)[0]) for leaf in (None, LEAF))
        rows.append(
            Row(
                "ring",
                f"{size} ranks, token-ring, leaves of {LEAF}",
                "bytes beside one partial a rank",
                exact / fast,
                "x",
                1,
            )
        )
    return rows
