"""A batch whose prompts share nested prefixes: in the planned order and in the order of arrival, on one engine, and
through a whole stack, logs and receipts included.

Both orders have the same lines, model and cache, which is too small for all prefixes, so that it evicts (LRU). Lines in
the planned order come as `countersign batch` sends them: as many as fit the cache. An oracle computes each token of the
prefix tree once.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from countersign.batch.admission import Admission
from countersign.batch.folder import BatchFolder
from countersign.batch.lines import Body, Line
from countersign.batch.plan import Job, plan_batch
from countersign.batch.runner import BatchRunner
from countersign.cli.bench import Row, stack_config
from countersign.client import Client
from countersign.services.engine.engine import Engine, kept_of
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.services.runtime.config import load
from countersign.services.runtime.supervisor import Supervisor

LINES, QUICK_LINES, TURNS = 2000, 300, 3
STACK_LINES, QUICK_STACK_LINES, AT_ONCE = 500, 100, 128
INSTRUCTIONS, DOCUMENTS = 5, 8
INSTRUCTION_TOKENS, DOCUMENT_TOKENS, QUESTION_TOKENS, ANSWER_TOKENS = (60, 110), (120, 200), (8, 24), (2, 12)
CACHE_TOKENS = 4096
ROOT = root_key(bytes(32), "benchmark", "batch")


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one run: prompt tokens computed, tokens whose KV was there, output tokens, seconds, answers."""

    computed: int
    cached: int
    output: int
    seconds: float
    answers: Sequence[Sequence[int]]


async def run(quick: bool) -> list[Row]:
    """Prefill tokens saved of what an oracle saves, and tokens a second, in turns (quick: fewer lines, one turn)."""
    config = load(None, {}, []).target
    model = load_model(config.model, dtype=config.dtype, threads=config.threads)
    jobs = nested_jobs(QUICK_LINES if quick else LINES)
    planned, arrived = list[Served](), list[Served]()
    for turn in range(1 if quick else TURNS):
        for ours in (True, False) if turn % 2 else (False, True):
            (planned if ours else arrived).append(_serve(model, jobs, planned=ours))
    if any(served.answers != planned[0].answers for served in (*planned, *arrived)):
        raise AssertionError("the order of a batch changed its answers")
    through = await _through_a_stack(jobs[: QUICK_STACK_LINES if quick else STACK_LINES])
    return [*_rows(jobs, planned, arrived), *through]


def nested_jobs(lines: int) -> list[Job]:
    """Each of an instruction, a document below it and a question of its own, shuffled."""
    rng = random.Random(6)

    def text(most: tuple[int, int]) -> list[int]:
        return [rng.randrange(10, 500) for _ in range(rng.randint(*most))]

    heads = []
    for _ in range(INSTRUCTIONS):
        instruction = text(INSTRUCTION_TOKENS)
        heads += [[*instruction, *text(DOCUMENT_TOKENS)] for _ in range(DOCUMENTS)]
    return [Job([*rng.choice(heads), *text(QUESTION_TOKENS)], rng.randint(*ANSWER_TOKENS)) for _ in range(lines)]


def _serve(model: Model, jobs: Sequence[Job], *, planned: bool) -> Served:
    engine = Engine.of(model, PagedCache(model.config, model.dtype, tokens=CACHE_TOKENS))
    begin = time.perf_counter()
    generations = _planned(engine, jobs) if planned else _arrived(engine, jobs)
    return Served(
        engine.sharing.computed,
        sum(each.cached for each in generations),
        sum(len(each.generated) for each in generations),
        time.perf_counter() - begin,
        [each.generated for each in generations],
    )


def _planned(engine: Engine, jobs: Sequence[Job]) -> list[Generation]:
    """As `countersign batch` does it; the planning is part of the time."""
    generations = [_generation(number, job) for number, job in enumerate(jobs)]
    admission = Admission(plan_batch(jobs), jobs, CACHE_TOKENS, len(jobs))
    for number in admission.admit():
        engine.submit(generations[number])
    while not admission.over:
        for name in _pass(engine):
            admission.done(int(name))
        for number in admission.admit():
            engine.submit(generations[number])
    return generations


def _arrived(engine: Engine, jobs: Sequence[Job]) -> list[Generation]:
    """All at once; the engine takes them in as they came."""
    generations = [_generation(number, job) for number, job in enumerate(jobs)]
    for each in generations:
        engine.submit(each)
    while len(engine):
        list(_pass(engine))
    return generations


def _generation(number: int, job: Job) -> Generation:
    return Generation(str(number), list(job.token_ids), job.max_tokens, keys=chain_keys(ROOT, job.token_ids))


def _pass(engine: Engine) -> Iterator[str]:
    """One pass; who is done."""
    ran = engine.run(engine.plan())
    engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
    for result in ran.results:
        if result.outcome.error:
            raise AssertionError(result.outcome.error)
        if not result.generation.left:
            engine.remove(result.generation.id)
            yield result.generation.id


def _rows(jobs: Sequence[Job], planned: Sequence[Served], arrived: Sequence[Served]) -> list[Row]:
    tree = plan_batch(jobs).tree
    oracle = tree.prompt_tokens - tree.distinct_tokens
    case = f"{len(jobs)} lines, prefixes nested in two levels, a cache of {CACHE_TOKENS} tokens"
    n = len(jobs) * len(planned)
    rows = []
    for name, runs in (("planned", planned), ("order of arrival", arrived)):
        saved = statistics.median((tree.prompt_tokens - served.computed) / oracle for served in runs)
        bar = (">= 0.9", saved >= 0.9) if runs is planned else (None, None)
        rows.append(
            Row("batch", case, f"prefill tokens saved of what an oracle saves, {name}", saved, "share", n, *bar)
        )
    speeds = [statistics.median(served.output / served.seconds for served in runs) for runs in (planned, arrived)]
    ratio = statistics.median(
        (ours.output / ours.seconds) / (theirs.output / theirs.seconds)
        for ours, theirs in zip(planned, arrived, strict=True)
    )
    met = ratio >= 1.3
    rows.append(
        Row(
            "batch", case, "output tokens, planned", speeds[0], "tokens/s", n, ">= 1.3x", met, "order of arrival", ratio
        )
    )
    rows.append(Row("batch", case, "output tokens, order of arrival", speeds[1], "tokens/s", n))
    begin = time.perf_counter()
    plan = plan_batch(jobs)
    seconds = time.perf_counter() - begin
    rows.append(Row("batch", case, f"planning: {len(plan.groups)} groups", seconds, "s", len(jobs)))
    return rows


async def _through_a_stack(jobs: Sequence[Job]) -> list[Row]:
    """The same by `countersign batch` and by as many clients as it may have, without the store of blocks, in turns."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    saved: dict[bool, list[float]] = {True: [], False: []}
    tree = plan_batch(jobs).tree
    for turn in range(2):
        for ours in (True, False) if turn % 2 else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                cache = f"target.cache_tokens={CACHE_TOKENS}"
                config = stack_config(folder, "draft.enabled=false", cache, "target.kv_store=false")
                async with (
                    Supervisor(config) as stack,
                    Client(stack.router_address) as client,
                ):
                    begin = time.perf_counter()
                    cached = await (_batch(client, jobs, Path(folder) / "out") if ours else _clients(client, jobs))
                    seconds[ours].append(time.perf_counter() - begin)
                    saved[ours].append(cached / (tree.prompt_tokens - tree.distinct_tokens))
    output = sum(job.max_tokens for job in jobs)
    ratio = statistics.median(theirs / ours for ours, theirs in zip(seconds[True], seconds[False], strict=True))
    case, n = f"{len(jobs)} lines through a whole stack, {AT_ONCE} at once", 2 * len(jobs)
    name, peer = "prefill tokens saved of what an oracle saves, by the receipts", "order of arrival"
    share, speed = statistics.median(saved[True]), output / statistics.median(seconds[True])
    return [
        Row("batch", case, f"{name}, planned", share, "share", n, ">= 0.9", share >= 0.9),
        Row("batch", case, f"{name}, {peer}", statistics.median(saved[False]), "share", n),
        Row("batch", case, "output tokens, planned", speed, "tokens/s", n, ">= 1.3x", ratio >= 1.3, peer, ratio),
    ]


async def _batch(client: Client, jobs: Sequence[Job], folder: Path) -> int:
    """Prompt tokens whose KV was there."""
    lines = [
        Line(number, str(number), Body(list(job.token_ids), "", job.max_tokens, 0.0, ignore_eos=True))
        for number, job in enumerate(jobs, start=1)
    ]
    with BatchFolder(folder, "benchmark") as out:
        progress = await BatchRunner(client, out, most=AT_ONCE).run(lines)
    if progress.completed < len(jobs):
        raise AssertionError(f"{progress.failed} lines failed")
    return progress.cached_prompt_tokens


async def _clients(client: Client, jobs: Sequence[Job]) -> int:
    """Prompt tokens whose KV was there."""
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(job: Job) -> int:
        async with gate:
            answer = await client.complete(job.token_ids, max_tokens=job.max_tokens, ignore_eos=True)
            return answer.usage.cached_prompt_tokens

    return sum(await asyncio.gather(*(one(job) for job in jobs)))
