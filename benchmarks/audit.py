"""Who is found, and by how many tokens: Token-DiFR against providers of the demo target that cheat on purpose.

Each dishonest provider (services/target/faults.py) and an honest one answer the same prompts, drawn at T = 1, top-k 50,
top-p 0.95. Their scores, under a reference of the same arithmetic (fp32) and under one of another (bf16), are cut into
disjoint runs of 1 to 1000 tokens, in order, as an auditor gets them; each run is judged by the verdict's own statistic,
the chance of what was found where the provider is honest, with the thresholds of the model's profile. The published
statistic, the mean of the clipped scores, stands beside it. AUC is Mann and Whitney's, ties count half.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from countersign.cli.bench import CHECKOUT, Row, call
from countersign.cli.prompts import heldout_prompts
from countersign.client import Client
from countersign.services.draft.proposer import Ask, Proposer
from countersign.services.engine.engine import Engine, Propose, complete
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.ranks.load import load_ranked_model
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.speculation import Draft
from countersign.services.engine.text import Tokenizer
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.config import FREE_PORTS, load
from countersign.services.runtime.supervisor import Supervisor
from countersign.services.target.faults import FAULTS as ALL_FAULTS
from countersign.services.target.faults import DishonestRunner, Fault, load_dishonest, shifted
from countersign.verify.arithmetic import Arithmetic, Dtype
from countersign.verify.audit import audit
from countersign.verify.difr import load_reference, score_tokens
from countersign.verify.difr.calibration import SLACK
from countersign.verify.difr.detection import Detector, Scores, auc, interval, power
from countersign.verify.difr.evidence import Evidence
from countersign.verify.difr.statistics import upper_rate
from countersign.verify.difr.verdict import THRESHOLDS, Thresholds, judge
from countersign.verify.keys import load_public
from countersign.verify.receipt import sign
from countersign.verify.testing import Asked, example_receipt, signing_key

MODELS = CHECKOUT / "infra" / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
PROMPTS = 200
CALIBRATED = 384
"""Held-out prompts that the profile of the demo target was made of; its thresholds are judged on others."""
SIZES = (1, 3, 10, 30, 100, 300, 1000)
REFERENCES: tuple[Dtype, ...] = ("fp32", "bf16")
FAULTS = {name: fault for name, fault in ALL_FAULTS.items() if not fault.inflation}
"""Those that show in the tokens' scores; tokens that the model never said are for ``countersign bench coin``."""
HONEST = Fault("no fault")
_STYLES = ("-", "--")
# What others found (facts and sources: docs/audit.md).
PAPERS = {
    "int4": "> 0.999 in 300 [1]; about 1,000 tokens [2]",
    "int8": "0.530 [3]",
    "fp8-kv": "1.000 [3]; about 10,000 tokens [2]",
    "temperature-1.05": "0.970 [3]",
    "seed": "about 100 tokens [2]",
}
TABLE = (
    "fault",
    "tokens that differ",
    "found in 100",
    "in 300",
    "in 1000",
    "AUC, 300",
    "AUC, 300, bf16",
    "published mean, bf16",
    "papers",
)
# What the issue asks for: the fault, tokens, least AUC.
BARS = {
    ("int4", 300): 0.999,
    ("seed", 300): 0.999,
    ("temperature-1.1", 300): 0.999,
    ("int8", 1000): 0.95,
    ("bug-1", 1000): 0.95,
    ("draft-1", 1000): 0.95,
}

Detectors: TypeAlias = "Mapping[tuple[str, Dtype], Detector]"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run: how many requests at once, prompt tokens a pass, and what else a deployment may do."""

    name: str
    batch: int = 64
    chunk: int = 256
    cached: bool = False
    drafting: bool = False
    ranks: int = 1


HONEST_WAYS = (
    Way("alone", batch=1),
    Way("batch 8, chunks of 64", batch=8, chunk=64),
    Way("batch 64, cached prefixes", cached=True),
    Way("batch 16, drafts", batch=16, drafting=True),
    Way("batch 8, two ranks", batch=8, ranks=2),
)


@dataclass(frozen=True, slots=True)
class Job:
    """Answers ``first`` to ``end`` of a provider, of ``tokens`` each."""

    fault: str
    first: int
    end: int
    tokens: int

    def file(self, folder: Path) -> Path:
        """Where its scores are kept."""
        return folder / f"{self.fault}-{self.tokens}-{self.first}-{self.end}.npz"


async def run(quick: bool) -> list[Row]:
    """Quick: few answers, short ones."""
    torch.set_num_threads(1)
    rounds = 3 if quick else 9
    return [*await _costs_on_a_stack(rounds), *await asyncio.to_thread(_run, quick, rounds)]


def _run(quick: bool, rounds: int) -> list[Row]:
    found = scores(quick)
    rows = [*_costs(rounds)]
    for dtype in REFERENCES:
        limits = thresholds(dtype)
        honest = Detector(found["none", dtype], limits)
        for name in FAULTS:
            rows += _detection(name, dtype, honest, Detector(found[name, dtype], limits))
            rows += _over_many(name, dtype, found[name, dtype], limits)
        rows += _over_many("none", dtype, found["none", dtype], limits)
    return [*rows, *_false_positives(quick)]


def thresholds(dtype: Dtype) -> Thresholds:
    """For honest answers in fp32 under a reference of this dtype, by the model's profile if it has one."""
    reference = load_reference(TARGET, dtype)
    if reference.profile is None:
        return THRESHOLDS[dtype]
    return reference.profile.thresholds(Arithmetic("fp32", "native"), reference.arithmetic)


# Scores


def scores(quick: bool) -> Mapping[tuple[str, Dtype], Scores]:
    """By provider ("none" is honest) and reference; computed once for the same code, by two processes."""
    sources = [CHECKOUT / "services" / "target" / "faults.py", CHECKOUT / "verify" / "difr" / "scores.py"]
    made_by = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:12]
    folder = CHECKOUT / "build" / f"audit-scores-{made_by}"
    folder.mkdir(parents=True, exist_ok=True)
    jobs = _jobs(quick)
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(call, "audit", "scored", str(folder), *astuple(job)) for job in jobs]:
            done.result()
    parts: dict[tuple[str, Dtype], list[Scores]] = {}
    for job in jobs:
        with np.load(job.file(folder)) as kept:
            for dtype in REFERENCES:
                parts.setdefault((job.fault, dtype), []).append(kept[dtype])
    return {key: np.concatenate(part) for key, part in parts.items()}


def _jobs(quick: bool) -> list[Job]:
    tokens, part, honest, each = (100, 8, 40, 8) if quick else (300, 100, 1000, 200)
    counts = [("none", honest), *((name, each) for name in FAULTS)]
    return [Job(name, first, first + part, tokens) for name, count in counts for first in range(0, count, part)]


def scored(folder: str, name: str, first: int, end: int, tokens: int) -> None:
    """Does a job in a process of its own, if that was not done before."""
    file = Job(name, first, end, tokens).file(Path(folder))
    if file.is_file():
        return
    torch.set_num_threads(1)
    fault = FAULTS.get(name, HONEST)
    asked = [_asked(number) for number in range(first, end)]
    outputs = answers(fault, asked, tokens, Way(name, drafting=fault.drafts))
    found: dict[str, Any] = {dtype: _under(dtype, asked, outputs) for dtype in REFERENCES}
    fresh = file.with_suffix(".part.npz")
    np.savez_compressed(fresh, **found)
    fresh.replace(file)


def _under(dtype: Dtype, asked: Sequence[tuple[list[int], Sampling]], outputs: Sequence[list[int]]) -> Scores:
    model, slack = _reference(dtype), 0.0 if dtype == "fp32" else SLACK["bf16"]
    rows = [
        [token.score for token in score_tokens(model, prompt, output, sampling, slack)]
        for (prompt, sampling), output in zip(asked, outputs, strict=True)
    ]
    return np.array(rows)


@cache
def _reference(dtype: Dtype) -> Model:
    return load_model(TARGET, dtype=dtype)


@cache
def _prompts(first: int) -> list[list[int]]:
    tokenizer, texts = Tokenizer(TARGET), heldout_prompts(MODELS, first + PROMPTS)[first:]
    return [tokenizer.encode(prompt.text, plain=True) for prompt in texts]


def _asked(number: int, first: int = 0) -> tuple[list[int], Sampling]:
    """No two the same: prompts, those from the ``first`` on, come back with other seeds."""
    return _prompts(first)[number % PROMPTS], Sampling(1.0, 50, 0.95, 7_000_000 + number)


def answers(
    fault: Fault, asked: Sequence[tuple[list[int], Sampling]], tokens: int, way: Way, model: Model | None = None
) -> list[list[int]]:
    """What a provider answers."""
    longest = max(len(prompt) for prompt, _ in asked) + tokens
    size = 1024 + way.batch * (longest + 32)
    if way.ranks > 1:
        model, cache = load_ranked_model(
            TARGET, ranks=way.ranks, tokens=size, unit=0, dtype="fp32", threads=1, timeout=60.0
        )
    else:
        model = model or (load_model(TARGET) if fault is HONEST else load_dishonest(fault, TARGET, DRAFT))
        cache = PagedCache(model.config, model.dtype, tokens=size)
    engine = Engine.of(model, cache, chunk=way.chunk, most=way.batch, runner=DishonestRunner(model, cache, fault))
    generations = [_generation(index, fault, one, tokens, way) for index, one in enumerate(asked)]
    try:
        complete(engine, generations, _drafting() if way.drafting else None)
    finally:
        engine.close()
    return [generation.generated for generation in generations]


def _generation(index: int, fault: Fault, asked: tuple[list[int], Sampling], tokens: int, way: Way) -> Generation:
    prompt, sampling = asked
    unseen = fault.unseen(len(prompt))
    seen = prompt[unseen:]
    keys = chain_keys(root_key(bytes(32), "bench", "audit"), seen) if way.cached else ()
    return Generation(str(index), seen, tokens, shifted(fault.sampling(sampling), unseen), keys=keys)


def _drafting() -> Propose:
    draft = load_model(DRAFT)
    proposer = Proposer(draft, PagedCache(draft.config, draft.dtype, tokens=65_536))

    def propose(generations: Sequence[Generation]) -> dict[str, Draft]:
        asks = [Ask(g.id, 0, tuple(g.tokens), min(4, g.left - 1), g.sampling) for g in generations if g.left > 1]
        found = zip(asks, proposer.propose(asks), strict=True)
        return {ask.request_id: Draft(tokens) for ask, tokens in found if not isinstance(tokens, int)}

    return propose


# Detection


def _detection(name: str, dtype: Dtype, honest: Detector, dishonest: Detector) -> Iterator[Row]:
    case = f"{name}, {_under_what(dtype)}"
    for size in SIZES:
        ours, theirs = (honest.found(size), dishonest.found(size)), (honest.means(size), dishonest.means(size))
        if min(len(part) for part in ours) < 2:
            continue
        value, published, n = auc(*ours), auc(*theirs), len(ours[1])
        bar = BARS.get((name, size)) if dtype == "fp32" else None
        ratio = value / published if published else None
        wanted, met = (None, None) if bar is None else (f">= {bar}", value >= bar)
        yield Row("audit", case, f"AUC, {size} tokens", value, "", n, wanted, met, "published mean", ratio)
        yield Row("audit", case, f"found at 1 % false positives, {size} tokens", power(*ours), "share", n)
        if size in (300, 1000):
            for side, end in zip(("lower", "upper"), interval(*ours), strict=True):
                yield Row("audit", case, f"AUC, {size} tokens, {side} end of 95 %", end, "", n)


def _over_many(name: str, dtype: Dtype, answers: Scores, limits: Thresholds, orders: int = 20) -> Iterator[Row]:
    """Tokens until the evidence over answers of one provider refutes it, in random orders."""
    draws, took = np.random.default_rng(0), list[float]()
    for _ in range(orders):
        evidence = Evidence.none(limits)
        for index in draws.permutation(len(answers)):
            evidence = evidence.add([float(score) for score in answers[index]])
            if evidence.refuted():
                break
        took.append(evidence.tally.size if evidence.refuted() else math.inf)
    case = f"{name}, {_under_what(dtype)}"
    refuted = sum(math.isfinite(tokens) for tokens in took) / orders
    yield Row("audit", case, f"refuted by the evidence of {answers.size} tokens", refuted, "share", orders)
    if refuted == 1:
        yield Row("audit", case, "tokens until the evidence refutes, p50", statistics.median(took), "tokens", orders)


def _under_what(dtype: Dtype) -> str:
    return "same arithmetic" if dtype == "fp32" else "bf16 reference"


# Honest runs, and what it costs


def _false_positives(quick: bool) -> Iterator[Row]:
    """Receipts of honest providers that a verdict refuses, in each way to run and under each reference."""
    each, tokens = (4, 60) if quick else (260, 100)
    refused = dict.fromkeys(REFERENCES, 0)
    judged = 0
    for index, way in enumerate(HONEST_WAYS):
        few = each if way.ranks == 1 else max(2, each // 4)
        asked = [_asked(1_000_000 * (index + 1) + number, CALIBRATED) for number in range(few)]
        outputs = answers(HONEST, asked, tokens, way)
        judged += few
        for dtype in REFERENCES:
            limits = thresholds(dtype)
            verdicts = [judge([float(score) for score in answer], limits) for answer in _under(dtype, asked, outputs)]
            failed = sum(verdict.outcome == "fail" for verdict in verdicts)
            refused[dtype] += failed
            yield Row("audit", f"honest, {way.name}, {dtype} reference", "refused", failed / few, "share", few)
    for dtype, failed in refused.items():
        most, case = upper_rate(failed, judged, 0.05), f"honest, all ways, {dtype} reference"
        yield Row("audit", case, "refused", failed / judged, "share", judged, "<= 0.01", failed / judged <= 0.01)
        yield Row("audit", case, "refused, upper end of 95 %", most, "share", judged)


async def _costs_on_a_stack(rounds: int) -> list[Row]:
    """The whole audit of a receipt over 300 tokens against answering them on a running stack, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        config = load(None, os.environ, [f"data_dir={folder}", *FREE_PORTS])
        prompt = heldout_prompts(MODELS, 1)[0].text
        made, audited = list[float](), list[float]()
        async with Supervisor(config) as stack, Client(stack.router_address) as client:
            key = load_public(config.data_dir / "keys" / "receipts.pub")
            reference = load_reference(TARGET, "fp32")
            for turn in range(rounds + 1):
                began = time.perf_counter()
                answer = await client.complete(
                    prompt, max_tokens=300, temperature=1.0, top_k=50, top_p=0.95, seed=turn, ignore_eos=True
                )
                answered = time.perf_counter()
                report = audit(answer.receipt, trusted_keys=[key], reference=lambda _: reference, levels=["tokens"])
                if report.verdict != "pass":
                    raise RuntimeError(f"an honest answer was refused: {report.levels}")
                if turn:  # the first warms up
                    made.append(answered - began)
                    audited.append(time.perf_counter() - answered)
    share = statistics.median(audited) / statistics.median(made)
    case = "300 tokens, a stack with drafts, fp32"
    return [
        Row("audit", case, "answering", statistics.median(made) * 1e3, "ms", rounds),
        Row("audit", case, "audit: form, count, tokens", statistics.median(audited) * 1e3, "ms", rounds),
        Row("audit", case, "audit / answering", share, "share", rounds, "<= 0.15", share <= 0.15),
    ]


def _costs(rounds: int) -> Iterator[Row]:
    """An audit of 300 tokens against making them: alone, alone with drafts, as one of 64."""
    model, asked = load_model(TARGET), [_asked(number) for number in range(64)]
    ways = {
        "alone": (1, Way("", 1)),
        "alone, with drafts": (1, Way("", 1, drafting=True)),
        "as one of 64": (64, Way("")),
    }
    outputs = answers(HONEST, asked[:1], 300, Way("", 1), model)
    took: dict[str, list[float]] = {name: [] for name in ("audit", *ways)}
    for turn in range(rounds):
        began = time.perf_counter()
        _under("fp32", asked[:1], outputs)
        took["audit"].append(time.perf_counter() - began)
        for name, (count, way) in ways.items():
            if count > 1 and turn >= 3:
                continue
            began = time.perf_counter()
            answers(HONEST, asked[:count], 300, way, model)
            took[name].append((time.perf_counter() - began) / count)
    checking = statistics.median(took["audit"])
    case = "300 tokens, the engine alone, one thread, fp32"
    yield Row("audit", case, "audit of the tokens", checking * 1e3, "ms", rounds)
    for name in ways:
        share = checking / statistics.median(took[name])
        yield Row("audit", case, f"audit / answering, {name}", share, "share", len(took[name]))
    yield from _bytes()


def _bytes() -> Iterator[Row]:
    receipt = example_receipt([5] * 97, [7] * 300, asked=Asked())
    bare, opened = sign(receipt[0], None, signing_key()), sign(*receipt, signing_key())
    case = "300 tokens of 97"
    yield Row("audit", case, "receipt without openings", len(bare) / 300, "bytes/token", 1)
    yield Row("audit", case, "what the tokens level needs beside it", (len(opened) - len(bare)) / 300, "bytes/token", 1)


# Pictures


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Power by tokens and ROC curves, under both references."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    found = scores(quick=max(row.n for row in rows) < 10_000)
    folder.mkdir(parents=True, exist_ok=True)
    detectors = {
        (name, dtype): Detector(found[name, dtype], thresholds(dtype))
        for name in ("none", *FAULTS)
        for dtype in REFERENCES
    }
    drawn = [_table(detectors, folder / "audit-table.md")]
    for what, draw in (("power", _draw_power), ("roc", _draw_roc)):
        figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True, layout="constrained")
        for axes, dtype in zip(panels, REFERENCES, strict=True):
            draw(axes, detectors, dtype)
            title = "the same arithmetic (fp32, native)" if dtype == "fp32" else "a bf16 reference, fp32 answers"
            axes.set(title=title)
            axes.grid(visible=True, alpha=0.25)
        panels[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
        file = folder / f"audit-{what}.png"
        figure.savefig(file, dpi=110)
        plt.close(figure)
        drawn.append(file)
    return drawn


def _table(detectors: Detectors, file: Path) -> Path:
    """What docs/audit.md shows, in Markdown."""
    lines = [
        "| " + " | ".join(TABLE) + " |",
        "|" + "---|" * len(TABLE),
    ]
    honest = {(dtype, size): detectors["none", dtype].found(size) for dtype in REFERENCES for size in (100, 300, 1000)}
    means = detectors["none", "bf16"].means(300)
    for name in FAULTS:
        same, other = detectors[name, "fp32"], detectors[name, "bf16"]
        shares = [power(honest["fp32", size], same.found(size)) for size in (100, 300, 1000)]
        areas = (
            auc(honest["fp32", 300], same.found(300)),
            auc(honest["bf16", 300], other.found(300)),
            auc(means, other.means(300)),
        )
        cells = [name, f"{same.differing:.2%}", *(f"{x:.1%}" for x in shares), *(f"{x:.4f}" for x in areas)]
        lines.append("| " + " | ".join((*cells, PAPERS.get(name, ""))) + " |")
    file.write_text("\n".join(lines) + "\n")
    return file


def _draw_power(axes: Any, detectors: Detectors, dtype: Dtype) -> None:
    honest = {size: detectors["none", dtype].found(size) for size in SIZES}
    sizes = [size for size in SIZES if len(honest[size]) > 1]
    for index, name in enumerate(FAULTS):
        shares = [power(honest[size], detectors[name, dtype].found(size)) for size in sizes]
        axes.plot(
            sizes, shares, marker="o", markersize=3, color=f"C{index % 10}", linestyle=_STYLES[index // 10], label=name
        )
    axes.set(xscale="log", xlabel="tokens", ylabel="found at 1 % false positives", ylim=(-0.02, 1.02))
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()


def _draw_roc(axes: Any, detectors: Detectors, dtype: Dtype, size: int = 100) -> None:
    honest = detectors["none", dtype].found(size)
    for index, name in enumerate(FAULTS):
        found = detectors[name, dtype].found(size)
        limits = np.unique(np.concatenate((honest, found, [np.inf])))[::-1]
        rates = [((part[None, :] >= limits[:, None]).mean(axis=1)) for part in (honest, found)]
        axes.plot(*rates, color=f"C{index % 10}", linestyle=_STYLES[index // 10], label=name)
    axes.set(xlabel="false positives", ylabel=f"found, {size} tokens", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
