"""The score of each output token, from one teacher-forced pass of the reference model.

Where two arithmetics differ they also differ about which tokens top-k and top-p leave. ``slack`` is how far a logit may
be off: a claimed token counts as out of support only if no such error lets it in, and it loses only against tokens that
no such error puts out. At slack 0 this is the published score.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from countersign.kernels import gumbel
from countersign.kernels.native import library as native
from countersign.kernels.native.library import Team
from countersign.services.engine.errors import NonFiniteLogits
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span
from countersign.services.engine.sampling import NOT_FINITE, Draws, Sampling, draw

CHUNK = 256
"""Most rows of logits at once: 256 x 151936 in fp32 are 156 MB."""

Reals = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TokenScore:
    """What the reference says of one output token.

    score: in logits; 0 where the reference samples it too, infinite where it is out of support. rank: how many tokens
    it would have sampled rather. choice: what it samples.
    """

    token: int
    choice: int
    score: float
    rank: int


@dataclass(slots=True)
class Kept:
    """The states (hidden) that the output tokens at ``positions`` were sampled from, kept of a pass that goes by."""

    positions: Collection[int]
    states: dict[int, torch.Tensor] = field(default_factory=dict)

    def take(self, first: int, states: torch.Tensor) -> None:
        """The states of output tokens ``first`` and on."""
        for position in self.positions:
            if first <= position < first + len(states):
                self.states[position] = states[position - first].clone()


def token_scores(model: Model, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> list[float]:
    """The published score of each output token, in logits; infinite where the token is out of support."""
    return [token.score for token in score_tokens(model, prompt, output, sampling)]


def score_tokens(
    model: Model,
    prompt: Sequence[int],
    output: Sequence[int],
    sampling: Sampling,
    slack: float = 0.0,
    kept: Kept | None = None,
) -> list[TokenScore]:
    """What the reference says of each output token. ``kept``: gets the states that it wants, in the same pass.

    Raises:
        EngineError: the reference cannot compute this text.
    """
    scores: list[TokenScore] = []
    for rows in teacher_forced(model, [*prompt, *output[:-1]], len(output), kept):
        first = len(prompt) + len(scores)
        claimed = output[len(scores) : len(scores) + len(rows)]
        choices = draw(rows, [Draws(range(first, first + len(rows)), sampling)], model.team or _team())
        for row, position, token, choice in zip(rows, range(first, first + len(rows)), claimed, choices, strict=True):
            scores.append(score_of(row, position, token, choice, sampling, slack))
    return scores


def teacher_forced(
    model: Model, token_ids: Sequence[int], wanted: int, kept: Kept | None = None
) -> Iterator[torch.Tensor]:
    """The logits (rows, vocabulary) fp32 on the CPU after each of the last ``wanted`` tokens, ``CHUNK`` at most.

    ``kept``: counts from the first of these.
    """
    cache = PagedCache(model.config, model.dtype, tokens=len(token_ids))
    sequence = cache.sequence()
    first = len(token_ids) - wanted
    for start in range(0, len(token_ids), CHUNK):
        chunk = token_ids[start : start + CHUNK]
        rows = min(len(chunk), max(0, start + len(chunk) - first))
        computed = model.compute(cache, [Span(sequence, chunk, rows)])
        if rows:
            if kept is not None:
                kept.take(start + len(chunk) - rows - first, computed.states)
            yield computed.logits.cpu()


@cache
def _team() -> Team | None:
    """A thread that samples natively where the model does not compute so: many times faster than Python."""
    library = native.load()
    return None if library is None else Team(library, 1)


def score_of(
    row: torch.Tensor, position: int, token: int, choice: int, sampling: Sampling, slack: float = 0.0
) -> TokenScore:
    """What logits (vocabulary,) say of the token at ``position`` where they choose ``choice``.

    Raises:
        NonFiniteLogits: they choose nothing.
    """
    if choice == NOT_FINITE:
        raise NonFiniteLogits(position)
    if token == choice:
        return TokenScore(token, choice, 0.0, 0)
    # Greedy choice takes the largest logit of all, so top-k and top-p rule nothing out.
    rule = sampling if sampling.temperature else Sampling()
    logits = row.numpy().astype(np.float64)
    ids = gumbel.allowed(logits, temperature=rule.temperature or 1.0, top_k=rule.top_k, top_p=rule.top_p)
    rivals = _perturbed(logits, position, ids, rule)
    own = float(_perturbed(logits, position, np.array([token]), rule)[0])
    ahead = np.flatnonzero(rivals > own)
    if not (np.any(ids == token) or (slack > 0 and possible(logits, token, rule, slack))):
        return TokenScore(token, choice, math.inf, len(ahead))
    ranked = ahead[np.argsort(-rivals[ahead])].tolist()
    rightful = (at for at in ranked if slack == 0 or certain(logits, int(ids[at]), rule, slack))
    winner = next(rightful, None)
    return TokenScore(token, choice, 0.0 if winner is None else float(rivals[winner]) - own, len(ahead))


def possible(logits: Reals, token: int, sampling: Sampling, slack: float) -> bool:
    """Whether top-k and top-p can leave a token where each logit may be off by ``slack``."""
    return _kept(logits, sampling, logits > logits[token] + 2 * slack, -2 * slack)


def certain(logits: Reals, token: int, sampling: Sampling, slack: float) -> bool:
    """Whether top-k and top-p leave a token whichever way each logit is off by ``slack``."""
    before = logits > logits[token] - 2 * slack
    before[token] = False
    return _kept(logits, sampling, before, 2 * slack)


def _kept(logits: Reals, sampling: Sampling, before: NDArray[np.bool_], shift: float) -> bool:
    """Whether there is room behind the tokens ``before``, whose logits rise by ``shift`` against all others."""
    count, top_k = int(before.sum()), sampling.top_k or len(logits)
    if count >= top_k:
        return False
    if sampling.top_p >= 1 or not count:
        return True
    survivors = logits
    if top_k < len(logits):
        survivors = np.partition(logits, len(logits) - top_k)[len(logits) - top_k :]
    with np.errstate(over="ignore"):  # the temperature is whatever was asked for: at a tiny one nothing else weighs
        weights = np.exp((survivors - survivors.max()) / sampling.temperature)
        ahead = np.exp((logits[before] - survivors.max() + shift) / sampling.temperature).sum()
        behind = max(weights.sum() - np.exp((logits[before] - survivors.max()) / sampling.temperature).sum(), 0.0)
    return bool(ahead < sampling.top_p * (ahead + behind))


def _perturbed(logits: Reals, position: int, ids: NDArray[np.int64], sampling: Sampling) -> Reals:
    if sampling.temperature == 0:
        return logits[ids]
    return logits[ids] + sampling.temperature * gumbel.gumbel(sampling.seed, position, ids)
