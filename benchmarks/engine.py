"""The engine beside what people would pick instead: same weights, same token ids, two threads, turn by turn.

Each engine is a worker process (``benchmarks/peers/``; ``python benchmarks/peers/install.py`` makes their environment).
One works at a time: a peer, ours, the next peer, ours. Idle ones sleep within 10 ms under OpenMP's default wait policy;
``OMP_WAIT_POLICY=PASSIVE`` would make CTranslate2 and llama.cpp eight times slower. Rates count whole calls, prefill
included; a ratio compares the runs that took turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from countersign.cli.bench import CHECKOUT, Row, load
from countersign.cli.prompts import heldout_prompts

MODELS = CHECKOUT / "infra" / "models"
BUILT = CHECKOUT / "build" / "bench"
PEERS_PYTHON = CHECKOUT / "build" / "peers" / "bin" / "python"
LARGE = BUILT / "llama-0.3b"
THREADS, TOKENS, STREAMS, PATIENCE_S = 2, 64, 16, 900.0
DRAFTED = {"draft": (1, 2, 3, 4, 6, 8), "lookup": (4, 6, 10)}
OURS = "ours"
TOLD = "what the engines tell, fp32"
TITLES = {
    "transformers": "transformers",
    "openvino": "OpenVINO GenAI",
    "llamacpp": "llama.cpp through llama-cpp-python",
    "ctranslate2": "CTranslate2",
}
Batch = list[list[int]]


class WorkerFailed(Exception):
    """A worker cannot do what was asked; the message says why."""


async def run(quick: bool) -> list[Row]:
    """Quick: 2 prompts of 32 tokens once, and no peers at 0.3 B."""
    size = Size(2, 1, 32, {"draft": (2,), "lookup": (6,)}) if quick else Size(8, 3, TOKENS, DRAFTED)
    if not PEERS_PYTHON.is_file():
        print("no peer is installed (python benchmarks/peers/install.py); measuring ours alone", file=sys.stderr)
    peers, before = list(TITLES), cpu_seconds()
    rows = await _demo(size, peers)
    rows += await _reduced(size)
    rows += await _large(size, [] if quick else peers)
    rows += [replace(row, bench="engine") for row in await load("steps").run(quick)]
    wall, others = (now - then for now, then in zip(cpu_seconds(), before, strict=True))
    quiet = others / wall <= 0.1
    metric = "cores that other programs kept busy; above the bar no speed here is judged"
    return [
        *(row if quiet or row.case == TOLD else replace(row, bar=None, met=None) for row in rows),
        Row("engine", "machine", metric, others / wall, "cores", 1, "<= 0.1", quiet),
    ]


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draws what ``benchmarks/steps.py`` draws."""
    drawn: list[Path] = load("steps").plot(rows, folder)
    return drawn


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured: prompts, rounds over them, new tokens a prompt, numbers of proposals to choose from."""

    prompts: int
    rounds: int
    tokens: int
    drafted: dict[str, tuple[int, ...]]

    def ids(self) -> Batch:
        """Held-out prompts as the demo pair's token ids: those measured, then as many to choose draft lengths on."""
        tokenizer = Tokenizer.from_file(str(MODELS / "demo-target" / "tokenizer.json"))
        count = max(2 * self.prompts, STREAMS)
        return [tokenizer.encode(prompt.text).ids for prompt in heldout_prompts(MODELS, count)]


class Worker:
    """One engine in a process of its own; speaks what ``benchmarks/peers/protocol.py`` says."""

    def __init__(self, module: str, process: asyncio.subprocess.Process) -> None:
        self.module, self._process = module, process
        self.name = module

    @classmethod
    async def start(cls, module: str, model: Path, draft: Path | None, precision: str) -> Worker:
        """Started and loaded. Raises WorkerFailed."""
        python = Path(sys.executable) if module == OURS else PEERS_PYTHON
        if not python.is_file():
            raise WorkerFailed("not installed: python benchmarks/peers/install.py")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "KMP_", "GOMP_"))}
        BUILT.mkdir(parents=True, exist_ok=True)
        with (BUILT / f"{module}.log").open("w") as log:
            process = await asyncio.create_subprocess_exec(
                python, "-m", f"peers.{module}",
                cwd=CHECKOUT / "benchmarks",
                env={**kept, "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=log, limit=2**24,
            )  # fmt: skip
        worker = cls(module, process)
        try:
            folders = {"model": str(model), "draft": draft and str(draft), "cache": str(BUILT)}
            loaded = await worker.ask(op="load", threads=THREADS, precision=precision, **folders)
        except BaseException:
            await worker.close()
            raise
        worker.name = OURS if module == OURS else f"{TITLES[module]} {loaded['version']}"
        worker.name += "" if precision == "fp32" else f", {precision} precision"
        return worker

    async def ask(self, **request: Any) -> dict[str, Any]:
        """The reply. Raises WorkerFailed."""
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise WorkerFailed("no pipe to the worker")
        stdin.write(json.dumps(request).encode() + b"\n")
        async with asyncio.timeout(PATIENCE_S):
            line = await stdout.readline()
        reply: dict[str, Any] = json.loads(line) if line else {"error": f"ended; see {BUILT.name}/{self.module}.log"}
        if why := reply.get("unsupported") or reply.get("error"):
            raise WorkerFailed(why)
        return reply

    async def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@dataclass(frozen=True, slots=True)
class Runner:
    """A worker with its task: batches of prompts, and how to speculate on them."""

    worker: Worker
    batches: Sequence[Batch]
    tokens: int
    speculation: str | None = None
    drafted: int = 0
    note: str = ""

    @property
    def name(self) -> str:
        """For people."""
        how = {"draft": f" with {self.drafted} from the draft", "lookup": f" with {self.drafted} looked up"}
        return self.worker.name + how.get(self.speculation or "", "") + self.note

    async def run(self, index: int) -> dict[str, Any]:
        """One batch. Raises WorkerFailed."""
        task = {"prompts": self.batches[index], "new_tokens": self.tokens}
        return await self.worker.ask(op="generate", speculation=self.speculation, drafted=self.drafted, **task)


@dataclass(slots=True)
class Measured:
    """What a runner took, by batch."""

    runner: Runner
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    first: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[int, Batch] = field(default_factory=dict)

    def add(self, index: int, reply: dict[str, Any]) -> None:
        """One more reply to batch ``index``."""
        self.seconds[index].append(reply["seconds"])
        self.first[index].append(reply["first_token_seconds"])
        self.outputs[index] = reply["tokens"]

    @property
    def rate(self) -> float:
        """New tokens a second of whole calls, from each batch's median."""
        count = sum(len(self.runner.batches[i]) for i in self.seconds) * self.runner.tokens
        return count / sum(map(statistics.median, self.seconds.values()))

    @property
    def step_seconds(self) -> float:
        """Seconds a token after the first: median over calls."""
        pairs = [(s, f) for i in self.seconds for s, f in zip(self.seconds[i], self.first[i], strict=True)]
        return statistics.median((s - f) / (self.runner.tokens - 1) for s, f in pairs)

    @property
    def calls(self) -> int:
        """How many."""
        return sum(map(len, self.seconds.values()))


@dataclass(frozen=True, slots=True)
class Pair:
    """A peer, and ours in the turns beside it."""

    theirs: Measured
    ours: Measured

    @property
    def ratio(self) -> float:
        """How many times as fast ours is."""
        return self.ours.rate / self.theirs.rate

    @property
    def alike(self) -> float:
        """Share of a prompt's tokens before the first that the two have different."""
        both = [(theirs, self.ours.outputs[i]) for i, theirs in self.theirs.outputs.items()]
        shares = [_common(a, b) / len(a) for theirs, ours in both for a, b in zip(theirs, ours, strict=False)]
        return statistics.mean(shares)

    def row(self, case: str, least: float | None = None, *, strictly: bool = False) -> Row:
        """The peer's rate; ``ratio`` and the bar are about ours beside it."""
        rate, sign = self.theirs.rate, ">" if strictly else ">="
        bar = None if least is None else f"{sign} {least:g}x"
        met = None if least is None else self.ratio > least if strictly else self.ratio >= least
        name = self.theirs.runner.name
        metric = f"{name}; ours is {self.ratio:.2f}x, tokens alike {self.alike:.0%}"
        return Row("engine", case, metric, rate, "tokens/s", self.theirs.calls, bar, met, name, self.ratio)


async def turns(ours: Runner, peers: Sequence[Runner], rounds: int) -> tuple[Measured, list[Pair]]:
    """Peer, ours, next peer, ours, for each batch in each round. All of ours together, and a pair a peer."""
    everything = Measured(ours)
    pairs = [Pair(Measured(peer), Measured(ours)) for peer in peers]
    for _ in range(rounds):
        for index in range(len(ours.batches)):
            for pair in pairs:
                pair.theirs.add(index, await pair.theirs.runner.run(index))
                reply = await ours.run(index)
                pair.ours.add(index, reply)
                everything.add(index, reply)
            if not pairs:
                everything.add(index, await ours.run(index))
    return everything, pairs


@contextlib.asynccontextmanager
async def workers(
    modules: Iterable[tuple[str, str]], model: Path, draft: Path | None, case: str, rows: list[Row]
) -> AsyncIterator[dict[str, Worker]]:
    """Workers for (module, precision), one loaded after the other; why one could not goes into ``rows``."""
    started: dict[str, Worker] = {}
    try:
        for module, precision in modules:
            try:
                started[module] = await Worker.start(module, model, draft, precision)
            except WorkerFailed as error:
                rows.append(_skipped(case, TITLES.get(module, module), str(error)))
        yield started
    finally:
        await asyncio.gather(*(worker.close() for worker in started.values()))


async def able(runners: Sequence[Runner], case: str, rows: list[Row]) -> list[Runner]:
    """Those that answer; their first call, which fills caches and compiles, is this one."""
    found = []
    for runner in runners:
        try:
            await runner.run(0)
            found.append(runner)
        except WorkerFailed as error:
            rows.append(
                _skipped(
                    case, runner.worker.name + (f", {runner.speculation}" if runner.speculation else ""), str(error)
                )
            )
    return found


async def _demo(size: Size, peers: list[str]) -> list[Row]:
    rows: list[Row] = []
    modules = [(module, "fp32") for module in (OURS, *peers)]
    async with workers(modules, MODELS / "demo-target", MODELS / "demo-draft", TOLD, rows) as started:
        if ours := started.pop(OURS, None):
            others = await _honest([ours, *started.values()], size, rows)
            if ours in others:
                others.remove(ours)
                rows += await _one_stream(ours, others, size)
                rows += await _with_draft(ours, others, size)
                rows += await _streams(ours, others, size)
    return rows


async def _honest(found: list[Worker], size: Size, rows: list[Row]) -> list[Worker]:
    """Those whose greedy tokens are transformers': fp32 noise may part them late, another model does at once."""
    batches = [[ids] for ids in size.ids()[: size.prompts]]
    runners = await able([Runner(worker, batches, size.tokens) for worker in found], TOLD, rows)
    told = {r.worker: [(await r.run(i))["tokens"][0] for i in range(len(batches))] for r in runners}
    reference = next((tokens for worker, tokens in told.items() if worker.module == "transformers"), None)
    if reference is None:
        return list(told)
    honest = []
    for worker, tokens in told.items():
        same = statistics.mean(_common(a, b) for a, b in zip(tokens, reference, strict=True)) / size.tokens
        metric = f"{worker.name}: greedy tokens as transformers' before the first that differs"
        rows.append(Row("engine", TOLD, metric, same, "share", len(batches), ">= 0.5", same >= 0.5))
        if same >= 0.5:
            honest.append(worker)
    return honest


async def _one_stream(ours: Worker, others: list[Worker], size: Size) -> list[Row]:
    case = "one stream, demo target, fp32"
    rows: list[Row] = []
    batches = [[ids] for ids in size.ids()[: size.prompts]]
    peers = await able([Runner(worker, batches, size.tokens) for worker in others], case, rows)
    mine, pairs = await turns(Runner(ours, batches, size.tokens), peers, size.rounds)
    rows += [_rate(case, mine), _first(case, mine)]
    rivals = [pair for pair in pairs if pair.theirs.runner.worker.module != "transformers"]
    hardest = min(rivals, key=lambda pair: pair.ratio, default=None)
    for pair in pairs:
        rows.append(pair.row(case, 4 if pair not in rivals else 1 if pair is hardest else None))
        rows.append(_first(case, pair.theirs))
    return rows


async def _with_draft(ours: Worker, others: list[Worker], size: Size) -> list[Row]:
    """Every engine with as many proposals a pass as suit it best, chosen on other prompts than those measured."""
    case = "one stream, demo pair, speculation, fp32"
    rows: list[Row] = []
    ids = size.ids()
    batches, practice = [
        [[row] for row in part] for part in (ids[: size.prompts], ids[size.prompts : 2 * size.prompts])
    ]
    tasks = [(ours, "draft"), *((worker, kind) for worker in others for kind in DRAFTED)]
    runners = [Runner(worker, practice, size.tokens, kind, 2) for worker, kind in tasks]
    chosen = [
        replace(await _best(runner, size.drafted[runner.speculation or ""]), batches=batches)
        for runner in await able(runners, case, rows)
    ]
    if not chosen or chosen[0].worker is not ours:
        return rows
    mine, pairs = await turns(
        chosen[0], [Runner(ours, batches, size.tokens, note=" without drafting"), *chosen[1:]], size.rounds
    )
    rows.append(_rate(case, mine))
    rows.append(pairs[0].row(case, 1.5))
    return rows + [pair.row(case, 1, strictly=True) for pair in pairs[1:]]


async def _best(runner: Runner, choices: Sequence[int]) -> Runner:
    seconds = {}
    for drafted in choices:
        trial = replace(runner, drafted=drafted)
        seconds[drafted] = sum([(await trial.run(i))["seconds"] for i in range(len(trial.batches))])
    return replace(runner, drafted=min(seconds, key=lambda drafted: seconds[drafted]))


async def _streams(ours: Worker, others: list[Worker], size: Size) -> list[Row]:
    case = f"{STREAMS} streams, demo target, fp32"
    rows: list[Row] = []
    ids = size.ids()
    single = [[row] for row in ids[: size.prompts]]
    batches = [(ids[i:] + ids[:i])[:STREAMS] for i in range(size.prompts)]
    peers = await able([Runner(worker, batches, size.tokens) for worker in others], case, rows)
    mine, pairs = await turns(
        Runner(ours, batches, size.tokens),
        [Runner(ours, single, size.tokens, note=", one stream"), *peers],
        size.rounds,
    )
    rows += [_rate(case, mine), pairs[0].row(case, 4)]
    # Prompts take as long together as one after another: arithmetic, not weights, is what they wait for.
    gain = STREAMS * pairs[0].theirs.step_seconds / mine.step_seconds
    rows.append(Row("engine", case, "decode steps beside one stream's, prompts not counted", gain, "x", mine.calls))
    return rows + [
        pair.row(case, 2 if pair.theirs.runner.worker.module == "transformers" else None) for pair in pairs[1:]
    ]


async def _reduced(size: Size) -> list[Row]:
    """Beyond fp32: each engine's own choice, ours in bf16."""
    case = "one stream, demo target, reduced precision (ours bf16)"
    rows: list[Row] = []
    batches = [[ids] for ids in size.ids()[: size.prompts]]
    modules = [(OURS, "default"), ("openvino", "default"), ("ctranslate2", "int8")]
    async with workers(modules, MODELS / "demo-target", None, case, rows) as started:
        runners = await able([Runner(worker, batches, size.tokens) for worker in started.values()], case, rows)
        if runners and runners[0].worker.module == OURS:
            mine, pairs = await turns(runners[0], runners[1:], size.rounds)
            rows += [_rate(case, mine), *(pair.row(case) for pair in pairs)]
    return rows


async def _large(size: Size, peers: list[str]) -> list[Row]:
    """The memory-bound fraction: bytes of weights a step, over its seconds, over what copying reaches here."""
    case = "one stream, 0.3 B Llama shape, fp32"
    rows: list[Row] = []
    await _write_large()
    batches = [[ids] for ids in size.ids()[: min(size.prompts, 3)]]
    async with workers([(module, "fp32") for module in (OURS, *peers)], LARGE, None, case, rows) as started:
        runners = await able([Runner(worker, batches, size.tokens // 2) for worker in started.values()], case, rows)
        if not runners or runners[0].worker.module != OURS:
            return rows
        rounds, copied, read = [], [], []
        for _ in range(size.rounds):
            rounds.append(await turns(runners[0], runners[1:], 1))
            copy, sums = await asyncio.to_thread(bandwidth)
            copied.append(copy)
            read.append(sums)
    seconds = statistics.median(mine.step_seconds for mine, _ in rounds)
    speed = (LARGE / "model.safetensors").stat().st_size / seconds
    share = speed / statistics.median(copied)
    n = len(rounds)
    rows += [
        Row("engine", case, "a decode step, prefill not counted", seconds * 1e3, "ms", n),
        Row("engine", case, "weights read a step / copy bandwidth", share, "share", n, ">= 0.6", share >= 0.6),
        Row("engine", case, "weights read a step / read bandwidth", speed / statistics.median(read), "share", n),
        Row("engine", case, "copy, 2 threads, read + write", statistics.median(copied) / 1e9, "GB/s", n),
        Row("engine", case, "read, 2 threads", statistics.median(read) / 1e9, "GB/s", n),
    ]
    for i, runner in enumerate(runners[1:]):
        theirs = statistics.median(pairs[i].theirs.step_seconds for _, pairs in rounds)
        metric = f"{runner.name}: a decode step; ours is {theirs / seconds:.2f}x as fast"
        rows.append(Row("engine", case, metric, theirs * 1e3, "ms", n, peer=runner.name, ratio=theirs / seconds))
    return rows


async def _write_large() -> None:
    command = ["-m", "peers.weights", str(MODELS / "demo-target"), str(LARGE)]
    process = await asyncio.create_subprocess_exec(sys.executable, *command, cwd=CHECKOUT / "benchmarks")
    if await process.wait():
        raise WorkerFailed(f"the 0.3 B shape could not be written to {LARGE}")


def bandwidth() -> tuple[float, float]:
    """(copy, read) bytes a second of 512 MiB, two threads, the best of 7; a copy counts what it reads and writes."""
    import torch

    source, target = np.ones(2**27, np.float32), np.zeros(2**27, np.float32)
    halves = [slice(0, 2**26), slice(2**26, 2**27)]
    torch.set_num_threads(THREADS)
    view = torch.from_numpy(source)
    with ThreadPoolExecutor(THREADS) as pool:
        copy = _fastest(lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), halves)))
    return 2 * source.nbytes / copy, source.nbytes / _fastest(view.sum)


def cpu_seconds() -> tuple[float, float]:
    """(time now, seconds that all cores together have spent on other programs; 0 where there is no /proc/stat)."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return time.monotonic(), 0.0
    user, nice, system, _idle, _wait, *interrupts = map(int, stat.read_text().splitlines()[0].split()[1:8])
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return time.monotonic(), busy - sum(os.times()[:4])


def _fastest(work: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Length of the prefix that both share."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def _rate(case: str, mine: Measured) -> Row:
    return Row("engine", case, mine.runner.name, mine.rate, "tokens/s", mine.calls)


def _first(case: str, measured: Measured) -> Row:
    times = [second for seconds in measured.first.values() for second in seconds]
    metric = f"{measured.runner.name}: first token, median"
    return Row("engine", case, metric, statistics.median(times) * 1e3, "ms", len(times))


def _skipped(case: str, name: str, why: str) -> Row:
    return Row("engine", case, f"{name} is not measured: {why}", 0, "", 0, peer=name)
