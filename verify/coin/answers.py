"""Many answers of one model at once, and what a provider could make of them: for benches, tests and training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.sampling import Draws, Sampling, draw, perturbed
from countersign.verify.coin.attacks import Thought
from countersign.verify.difr.scores import teacher_forced

BATCH = 32


@dataclass(frozen=True, slots=True)
class Ask:
    """Tokens to continue, and how the next ones are drawn, at their absolute positions."""

    tokens: Sequence[int]
    sampling: Sampling


def continued(model: Model, asks: Sequence[Ask], count: int) -> list[list[int]]:
    """The next ``count`` tokens of each, no token ending them.

    Raises:
        EngineError: the model cannot compute one of these texts.
    """
    answers: list[list[int]] = []
    for start in range(0, len(asks), BATCH):
        answers += _batch(model, asks[start : start + BATCH], count)
    return answers


def prolonged(model: Model, thought: Thought, hidden: int, sampling: Sampling) -> Thought:
    """The thought where the model must not say what it said after it: its second choice, and all that then follows.

    Where top-k and top-p leave no second choice, it is the best of those that they put out.
    """
    start = [*thought.prompt, *thought.hidden]
    (rows,) = teacher_forced(model, start, 1)
    forced = [_other_than(thought.visible[0], rows[0], len(start), sampling)]
    more = hidden + len(thought.visible) - len(thought.hidden) - 1
    (rest,) = continued(model, [Ask([*start, *forced], sampling)], more)
    tokens = (*thought.hidden, *forced, *rest)
    return Thought(thought.prompt, tokens[:hidden], tokens[hidden:])


def _other_than(token: int, row: Tensor, position: int, sampling: Sampling) -> int:
    for rule in (sampling, replace(sampling, top_k=0, top_p=1.0)):
        ids, scores = perturbed(row, position, rule)
        others = [int(other) for other in ids[(-scores).argsort()][:2] if other != token]
        if others:
            return others[0]
    raise ValueError("the vocabulary has one token only")


def _batch(model: Model, asks: Sequence[Ask], count: int) -> list[list[int]]:
    room = sum(-(-(len(ask.tokens) + count) // PAGE_TOKENS) * PAGE_TOKENS for ask in asks)
    cache = PagedCache(model.config, model.dtype, tokens=room)
    sequences = [cache.sequence() for _ in asks]
    answers: list[list[int]] = [[] for _ in asks]
    fresh: list[Sequence[int]] = [ask.tokens for ask in asks]
    for step in range(count):
        rows = model.forward(cache, [Span(s, tokens, 1) for s, tokens in zip(sequences, fresh, strict=True)]).cpu()
        drawn = draw(rows, [Draws([len(ask.tokens) + step], ask.sampling) for ask in asks], model.team)
        for answer, token in zip(answers, drawn, strict=True):
            answer.append(token)
        fresh = [[token] for token in drawn]
    return answers
