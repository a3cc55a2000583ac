"""Makes a profile: honest answers in every way that providers run, scored in every way that auditors do.

What is run here differs from a deployment in nothing that changes bits: batch, chunk and cache are those of the engine,
the arithmetic is one of its executors. Deployments on other devices add their answers as entries of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from countersign import __version__
from countersign.services.engine.engine import Engine, complete
from countersign.services.engine.generation import Generation
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Backend, Model, load_model
from countersign.services.engine.sampling import Sampling
from countersign.services.protocol.keys import chain_keys, root_key
from countersign.verify.arithmetic import Arithmetic, Dtype
from countersign.verify.difr.profile import Honest, Profile, counted
from countersign.verify.difr.scores import score_tokens

SLACK = {"fp32": 1e-3, "bf16": 0.05}
"""Logits that two arithmetics may be apart at the edge of the support, by the coarser of their dtypes."""

SAMPLINGS = ((1.0, 50, 0.95), (0.7, 0, 1.0), (1.0, 0, 0.9), (0.0, 0, 1.0))
"""Temperature, top-k and top-p of the answers, in turns."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One way to run honestly: how many requests at once, prompt tokens a pass, with cached prefixes or without.

    ``share``: of the prompts, for what is slow.
    """

    name: str
    dtype: Dtype
    backend: Backend
    batch: int
    chunk: int = 256
    cached: bool = False
    share: float = 1.0


CONDITIONS = (
    Condition("alone", "fp32", "auto", 1),
    Condition("batch 8, chunks of 64", "fp32", "auto", 8, 64),
    Condition("batch 64", "fp32", "auto", 64),
    Condition("batch 64, cached prefixes", "fp32", "auto", 64, cached=True),
    Condition("batch 8, chunks of 64", "bf16", "auto", 8, 64),
    Condition("batch 64", "bf16", "auto", 64),
    Condition("batch 64", "fp32", "eager", 64, share=0.25),
    Condition("batch 64", "bf16", "eager", 64, share=0.25),
)
REFERENCES: tuple[tuple[Dtype, Backend], ...] = (("fp32", "auto"), ("bf16", "auto"))


@dataclass(frozen=True, slots=True)
class Answer:
    """A prompt, how it was answered, and what was said."""

    prompt: tuple[int, ...]
    sampling: Sampling
    output: tuple[int, ...]


def samplings(count: int, first_seed: int) -> list[Sampling]:
    """How ``count`` answers are drawn."""
    rules = [SAMPLINGS[index % len(SAMPLINGS)] for index in range(count)]
    return [Sampling(*rule, first_seed + index) for index, rule in enumerate(rules)]


def honest_answers(
    model: Model, condition: Condition, prompts: Sequence[Sequence[int]], rules: Sequence[Sampling], tokens: int
) -> list[Answer]:
    """One answer of ``tokens`` a prompt.

    Raises:
        EngineError: the model cannot compute them.
    """
    longest = max(map(len, prompts)) + tokens
    cache = PagedCache(model.config, model.dtype, tokens=1024 + condition.batch * (longest + 16))
    engine = Engine.of(model, cache, budget=max(512, condition.batch), chunk=condition.chunk, most=condition.batch)
    root = root_key(model.digests.weights, "calibration", condition.name)
    generations = [
        Generation(
            str(index), list(prompt), tokens, rule, keys=chain_keys(root, list(prompt)) if condition.cached else ()
        )
        for index, (prompt, rule) in enumerate(zip(prompts, rules, strict=True))
    ]
    complete(engine, generations)
    return [
        Answer(tuple(prompt), rule, tuple(generation.generated))
        for prompt, rule, generation in zip(prompts, rules, generations, strict=True)
    ]


def scores_of(reference: Model, answers: Sequence[Answer], slack: float) -> list[list[float]]:
    """The scores of each answer's tokens."""
    return [
        [token.score for token in score_tokens(reference, answer.prompt, answer.output, answer.sampling, slack)]
        for answer in answers
    ]


def calibrate(
    folder: Path,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    now_unix_ms: int,
    tell: Callable[[str], None] = lambda _: None,
) -> Profile:
    """The profile of the model in ``folder``: each condition answers each prompt with ``tokens``.

    Raises:
        CheckpointError, EngineError: the model cannot be loaded or computed here.
    """
    references = [load_model(folder, dtype=dtype, backend=backend) for dtype, backend in REFERENCES]
    answers: dict[Arithmetic, list[Answer]] = {}
    names: dict[Arithmetic, list[str]] = {}
    for (dtype, backend), conditions in groupby(CONDITIONS, key=lambda condition: (condition.dtype, condition.backend)):
        provider = load_model(folder, dtype=dtype, backend=backend)
        made = _arithmetic(provider)
        for number, condition in enumerate(conditions):
            asked = prompts[: max(1, round(len(prompts) * condition.share))]
            tell(f"{made}, {condition.name}: {len(asked)} answers of {tokens} tokens")
            rules = samplings(len(asked), first_seed=1_000_000 * (number + 1))
            answers.setdefault(made, []).extend(honest_answers(provider, condition, asked, rules, tokens))
            names.setdefault(made, []).append(condition.name)
    entries = []
    for made, given in answers.items():
        for reference in references:
            tell(f"{made} under {_arithmetic(reference)}")
            entries.append(_entry(made, reference, given, names[made]))
    digests = references[0].digests
    return Profile(
        folder.name,
        digests.weights,
        digests.config,
        digests.tokenizer,
        f"countersign/{__version__}",
        now_unix_ms,
        tuple(entries),
    )


def _entry(made: Arithmetic, reference: Model, answers: Sequence[Answer], conditions: Sequence[str]) -> Honest:
    scored = _arithmetic(reference)
    slack = 0.0 if made == scored else max(SLACK[made.dtype], SLACK[scored.dtype])
    return counted(scores_of(reference, answers, slack), made, scored, conditions, slack)


def _arithmetic(model: Model) -> Arithmetic:
    return Arithmetic("fp32" if model.dtype == "fp32" else "bf16", model.executor.name)
