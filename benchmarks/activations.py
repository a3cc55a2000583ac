"""What activation fingerprints find, in how many tokens and bytes, beside TOPLOC; and what they cost.

Providers with and without a fault (services/target/faults.py) answer held-out prompts with the demo target; the
reference computes the same texts. A token's score is the distance of :mod:`countersign.verify.activations`, that of n
tokens their mean. Tokens are shuffled and cut into disjoint groups, as DiFR's authors do it.

    fp32    honest: another executor (torch), dishonest: native code, reference: native code, all in fp32
    bf16    honest: native code and torch, dishonest: native code, reference: native code, all in bf16
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.cli.bench import CHECKOUT, Row, load
from countersign.cli.prompts import heldout_prompts
from countersign.kernels.fingerprint import Fingerprinter
from countersign.services.engine.engine import Engine, kept_of
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, load_model
from countersign.services.engine.runner import Runner
from countersign.services.engine.sampling import Sampling
from countersign.services.engine.text import Tokenizer
from countersign.services.target.faults import FAULTS, DishonestRunner, Fault, load_dishonest, shifted
from countersign.verify.activations import audit_activations, states_of
from countersign.verify.difr import Reference
from countersign.verify.difr.detection import auc, power
from countersign.verify.fingerprints import SEED, Challenge, commit, encode, open_positions
from countersign.verify.receipt import Openings
from countersign.verify.testing import SALT_KEY, example_receipt, model_of

MODELS = CHECKOUT / "infra" / "models"
TARGET, DRAFT = MODELS / "demo-target", MODELS / "demo-draft"
SIZES = (2, 4, 8, 16, 32, 64, 128)
DEFAULT = 8
COUNTS = (1, 2, 3, 10, 30)
FINDABLE = ("int4", "int8", "fp8-kv", "skip-layer", "checkpoint", "truncated", "evicted")
BLIND = ("seed", "temperature-1.1")
"""What changes no state: for the token level to find."""
ASKED = Sampling(1.0, 50, 0.95, 42)
BARS = {("int4", "fp32"): 0.999, ("int4", "bf16"): 0.999, ("int8", "fp32"): 0.95}
BATCHES = (1, 8, 64)
ANSWER, OPENED = 300, 16

Dtype = Literal["fp32", "bf16"]
Numbers = NDArray[np.float64]


@dataclass(slots=True)
class Recorder:
    """In place of fingerprints: keeps whole states, and names each by a number in the four bytes of its fingerprint."""

    states: list[Tensor] = field(default_factory=list)

    def __call__(self, states: Tensor) -> NDArray[np.float16]:
        first = len(self.states)
        self.states += states.float().cpu().clone().unbind()
        names = np.arange(first, len(self.states), dtype="<u4")
        return names.view("<f2").reshape(len(names), 2)

    def of(self, name: bytes) -> Tensor:
        """The state (hidden) that was named so."""
        return self.states[int.from_bytes(name, "little")]


@dataclass(frozen=True, slots=True)
class Answer:
    """``states`` (tokens, hidden): what the provider sampled the output's tokens from."""

    prompt: Sequence[int]
    output: Sequence[int]
    states: Tensor


def answers(
    model: Model, prompts: Sequence[Sequence[int]], tokens: int, fault: Fault | None = None, seed: int = 42
) -> list[Answer]:
    """What a provider answers, in one batch, to the prompts that it was asked, whatever it has shown the model."""
    recorder = Recorder()
    room = 512 + sum(len(prompt) + tokens + 32 for prompt in prompts)
    cache = PagedCache(model.config, "fp32" if model.dtype == "fp32" else "bf16", room)
    runner = Runner(model, cache, recorder) if fault is None else DishonestRunner(model, cache, fault, recorder)
    engine = Engine.of(model, cache, runner=runner)
    for number, prompt in enumerate(prompts):
        asked = Sampling(ASKED.temperature, ASKED.top_k, ASKED.top_p, seed + number)
        unseen = 0 if fault is None else fault.unseen(len(prompt))
        sampling = asked if fault is None else shifted(fault.sampling(asked), unseen)
        engine.submit(Generation(str(number), list(prompt[unseen:]), tokens, sampling))
    outputs: dict[str, tuple[list[int], list[Tensor]]] = {str(number): ([], []) for number in range(len(prompts))}
    while len(engine):
        ran = engine.run(engine.plan())
        kept = {result.generation.id: kept_of(result) for result in ran.results}
        engine.settle(ran, kept)
        for result in ran.results:
            name = result.generation.id
            outputs[name][0].extend(kept[name])
            outputs[name][1].extend(map(recorder.of, result.outcome.fingerprints[: len(kept[name])]))
            if not result.generation.left:
                engine.remove(name)
    return [
        Answer(prompt, output, torch.stack(states))
        for prompt, (output, states) in zip(prompts, outputs.values(), strict=True)
    ]


def reference_states(model: Model, answer: Answer) -> Tensor:
    """(tokens, hidden) of a teacher-forced pass over what the provider claims."""
    openings = Openings(SALT_KEY, tuple(answer.prompt), tuple(answer.output))
    return states_of(model, openings, range(len(answer.output))).float()


def distances(provider: Tensor, reference: Tensor, size: int) -> Numbers:
    """D of each token (T), as :func:`countersign.verify.activations.distance` has it."""
    printer = Fingerprinter(SEED, provider.shape[1], size)
    change = printer(provider).astype(np.float64) - printer(reference).astype(np.float64)
    scale = reference.double().norm(dim=1).numpy() * math.sqrt(size / provider.shape[1])
    return np.asarray(np.linalg.norm(change, axis=1) / scale)


def grouped(scores: Numbers, count: int) -> Numbers:
    """Means over disjoint groups of ``count`` shuffled tokens."""
    order = np.random.default_rng(count).permutation(len(scores))
    whole = len(scores) // count * count
    return np.asarray(scores[order[:whole]].reshape(-1, count).mean(axis=1))


@dataclass(frozen=True, slots=True)
class Pair:
    """States of one answer, by provider and by reference (tokens, hidden)."""

    provider: Tensor
    reference: Tensor


@dataclass(frozen=True, slots=True)
class Pool:
    """All pairs of one kind of provider."""

    pairs: Sequence[Pair]

    def scores(self, size: int) -> Numbers:
        """D of all tokens."""
        return np.concatenate([distances(pair.provider, pair.reference, size) for pair in self.pairs])

    def toploc(self, scheme: Any) -> tuple[Numbers, Numbers]:
        """TOPLOC's score of each whole chunk of 32 tokens, and whether it passes."""
        found = []
        for pair in self.pairs:
            for start in range(0, len(pair.provider) - scheme.CHUNK + 1, scheme.CHUNK):
                proof = scheme.prove(pair.provider[start : start + scheme.CHUNK])
                own = pair.reference[start : start + scheme.CHUNK]
                found.append((scheme.score(proof, own), float(scheme.compare(proof, own).passes)))
        scores, passes = np.array(found).T
        return scores, passes


def pool(provider: Model, reference: Model, prompts: Sequence[Sequence[int]], tokens: int, fault: str = "") -> Pool:
    """Answers of a provider, and what the reference has in their place."""
    given = answers(provider, prompts, tokens, FAULTS[fault] if fault else None)
    return Pool([Pair(answer.states, reference_states(reference, answer)) for answer in given])


def prompts_of(count: int) -> list[list[int]]:
    """Token ids of held-out prompts."""
    tokenizer = Tokenizer(TARGET)
    return [list(tokenizer.encode(prompt.text)) for prompt in heldout_prompts(MODELS, count)]


async def run(quick: bool) -> list[Row]:
    """Quick: few prompts, faults and sizes."""
    return await asyncio.to_thread(_run, quick)


def _run(quick: bool) -> list[Row]:
    torch.set_num_threads(1)
    prompts = prompts_of(4 if quick else 64)
    tokens = 32 if quick else 64
    dtypes: tuple[Dtype, ...] = ("fp32",) if quick else ("fp32", "bf16")
    names = ("int4", "int8", "seed") if quick else (*FINDABLE, *BLIND)
    rows: list[Row] = []
    for dtype in dtypes:
        rows += _detection(dtype, names, prompts, tokens, (2, DEFAULT) if quick else SIZES)
    rows += _bytes()
    rows += _cost(60 if quick else 600)
    rows += _audit(1 if quick else 5)
    return rows


def _detection(
    dtype: Dtype, names: Iterable[str], prompts: Sequence[Sequence[int]], tokens: int, sizes: Sequence[int]
) -> Iterator[Row]:
    scheme, reference = load("toploc"), load_model(TARGET, dtype=dtype)
    alike = pool(reference, reference, prompts, tokens)
    eager = pool(load_model(TARGET, dtype=dtype, backend="eager"), reference, prompts, tokens)
    others = eager if dtype == "fp32" else Pool([*eager.pairs, *alike.pairs])
    yield from _honest(dtype, others)
    for name in names:
        # What changes no state is compared with its own arithmetic: a torch provider would only be noise.
        honest = alike if name in BLIND else others
        dishonest = pool(load_dishonest(FAULTS[name], TARGET, DRAFT, dtype=dtype), reference, prompts, tokens, name)
        for size in sizes:
            positives, negatives = dishonest.scores(size), honest.scores(size)
            for count in COUNTS if size == DEFAULT else (2,):
                yield from _curve(f"{name}, {dtype}", f"k {size}", count, positives, negatives)
        (positives, refused), (negatives, _) = dishonest.toploc(scheme), honest.toploc(scheme)
        yield from _curve(f"{name}, {dtype}", "TOPLOC", scheme.CHUNK, positives, negatives)
        share = 1 - float(refused.mean())
        yield Row("activations", f"{name}, {dtype}, TOPLOC", "refused by its own limits", share, "share", len(refused))


def _honest(dtype: Dtype, honest: Pool) -> Iterator[Row]:
    scores = honest.scores(DEFAULT)
    for metric, value in (("median distance", np.median(scores)), ("largest distance", scores.max())):
        yield Row("activations", f"honest, {dtype}, k {DEFAULT}", metric, float(value), "", len(scores))


def _curve(case: str, scheme: str, count: int, positives: Numbers, negatives: Numbers) -> Iterator[Row]:
    """``count`` tokens a group; TOPLOC's scores are of groups already."""
    if scheme != "TOPLOC":
        positives, negatives = grouped(positives, count), grouped(negatives, count)
    number, area = len(positives) + len(negatives), auc(negatives, positives)
    name, _, dtype = case.partition(", ")
    least = BARS.get((name, dtype)) if (count, scheme) == (2, f"k {DEFAULT}") else None
    yield Row(
        "activations",
        f"{case}, {scheme}",
        f"AUC at {count} tokens",
        area,
        "",
        number,
        bar=None if least is None else f">= {least}",
        met=None if least is None else area >= least,
    )
    found = power(negatives, positives)
    yield Row("activations", f"{case}, {scheme}", f"found at 1 % false, {count} tokens", found, "share", number)


def _bytes() -> Iterator[Row]:
    scheme = load("toploc")
    for size in SIZES:
        yield Row("activations", f"k {size}", "kept and signed", 2.0 * size, "B a token", 1)
    yield Row("activations", "TOPLOC", "kept", scheme.PROOF_BYTES / scheme.CHUNK, "B a token", 1)
    prints = [bytes(2 * DEFAULT)] * ANSWER
    for count in (2, OPENED):
        drawn = range(0, ANSWER, ANSWER // count)[:count]
        size = len(encode(open_positions("r" * 32, prints, SALT_KEY, drawn)))
        yield Row("activations", f"{count} of {ANSWER} opened, k {DEFAULT}", "answer to a challenge", size, "B", 1)


def _cost(turns: int) -> Iterator[Row]:
    """Decode steps with fingerprints against steps without, step by step in turns."""
    model = load_model(TARGET)
    for batch in BATCHES:
        base, *others = _step_times(model, batch, turns, (0, DEFAULT, 128))
        for size, times in zip((DEFAULT, 128), others, strict=True):
            share = statistics.median(times) / statistics.median(base) - 1
            yield Row(
                "activations",
                f"{batch} decoding, k {size}",
                "fingerprints, share of a step",
                share,
                "share",
                len(times),
                peer="no fingerprints",
                ratio=1 + share,
            )
    prints = [bytes(2 * DEFAULT)] * ANSWER
    start = time.perf_counter()
    for _ in range(turns):
        commit("r" * 32, prints, SALT_KEY)
    took = 1e3 * (time.perf_counter() - start) / turns
    yield Row("activations", f"{ANSWER} tokens, k {DEFAULT}", "to commit", took, "ms", turns)


def _step_times(model: Model, batch: int, turns: int, sizes: Sequence[int]) -> list[list[float]]:
    """Seconds of each decode step, for each size of fingerprint (0: none)."""
    warm = 4
    engines = []
    for size in sizes:
        cache = PagedCache(model.config, "fp32", batch * (turns + 128))
        printer = Fingerprinter(SEED, model.config.hidden_size, size, model.team) if size else None
        engines.append(Engine.of(model, cache, runner=Runner(model, cache, printer)))
        for number in range(batch):
            engines[-1].submit(Generation(str(number), [5 + number, 7, 9], turns + 8, ASKED))
    times: list[list[float]] = [[] for _ in sizes]
    for turn in range(turns + warm):
        for engine, own in zip(engines, times, strict=True):
            start = time.perf_counter()
            ran = engine.run(engine.plan())
            engine.settle(ran, {result.generation.id: kept_of(result) for result in ran.results})
            if turn >= warm:
                own.append(time.perf_counter() - start)
    return times


def _audit(turns: int) -> Iterator[Row]:
    """The level on one answer against generating it alone."""
    model = load_model(TARGET)
    reference, prompt = Reference(model), prompts_of(1)[0]
    printer = Fingerprinter(SEED, model.config.hidden_size, DEFAULT, model.team)
    start = time.perf_counter()
    answer = answers(model, [prompt], ANSWER)[0]
    generating = time.perf_counter() - start
    prints = [row.tobytes() for row in printer(answer.states)]
    receipt, openings = example_receipt(prompt, answer.output, model=model_of(reference))
    receipt = _with_fingerprints(receipt, prints)
    drawn = tuple(range(0, ANSWER, ANSWER // OPENED))[:OPENED]
    challenge = Challenge(drawn, encode(open_positions(receipt.request_id, prints, SALT_KEY, drawn)))
    times = []
    for _ in range(turns):
        start = time.perf_counter()
        report = audit_activations(reference, receipt, openings, challenge)
        times.append(time.perf_counter() - start)
        if report.outcome != "pass":
            raise AssertionError(f"an honest answer is refused: {report.failures}")
    yield Row(
        "activations", f"{OPENED} of {ANSWER} tokens", "audit, share of generating",
        statistics.median(times) / generating,
        "share", turns,
    )  # fmt: skip


def _with_fingerprints(receipt: Any, prints: Sequence[bytes]) -> Any:
    from dataclasses import replace

    activations = commit(receipt.request_id, prints, SALT_KEY)
    return replace(receipt, evidence=replace(receipt.evidence, activations=activations))


def plot(rows: list[Row], folder: Path) -> list[Path]:
    """Draws what each size finds in two tokens, over its bytes, TOPLOC beside it."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for panel, dtype in zip(panels, ("fp32", "bf16"), strict=True):
        for name in FINDABLE:
            curve = [
                (2 * int(row.case.rpartition(" ")[2]), row.value)
                for row in rows
                if row.case.startswith(f"{name}, {dtype}, k ") and row.metric == "AUC at 2 tokens"
            ]
            if not curve:
                continue
            (line,) = panel.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=name)
            toploc = [row.value for row in rows if row.case == f"{name}, {dtype}, TOPLOC" and "AUC" in row.metric]
            panel.plot([8.06] * len(toploc), toploc, marker="x", color=line.get_color(), linestyle="none")
        panel.set(xscale="log", xlabel="bytes a token", title=f"{dtype}: 2 tokens (crosses: TOPLOC, 32 tokens)")
        panel.set_xticks([2 * size for size in SIZES], [str(2 * size) for size in SIZES])
        panel.minorticks_off()
        panel.grid(visible=True, alpha=0.25)
    panels[0].set(ylabel="AUC")
    panels[0].legend(fontsize=8)
    file = folder / "activations.png"
    figure.savefig(file, dpi=150)
    plt.close(figure)
    return [file]
