"""One forward pass over a batch: prefill, verification, sampling. Blocking; one thread calls it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from countersign.services.engine.errors import EngineError, NonFiniteLogits
from countersign.services.engine.kv import PagedCache
from countersign.services.engine.model import Model, Span
from countersign.services.engine.speculation import accept_chain
from countersign.services.target.batch import Work
from countersign.services.target.session import Pass


@dataclass(frozen=True, slots=True)
class Result:
    """What a pass gave one request: new tokens, nothing yet (inside a prefill), or why it failed."""

    work: Work
    sampled: Pass | None = None
    error: str = ""


class Verifier:
    """The target model, its paged cache, and the rule that every token is its own sample."""

    def __init__(self, model: Model, cache: PagedCache) -> None:
        self._model = model
        self._cache = cache

    def step(self, works: Sequence[Work]) -> list[Result]:
        """Feed every work's tokens in one pass; then, for each, walk its proposals while they are the target's samples.

        A rejected proposal's KV is dropped. A request whose logits are not finite fails alone.
        """
        spans = [Span(w.session.sequence, (*w.token_ids, *w.proposals), w.rows) for w in works]
        try:
            logits = self._model.forward(self._cache, spans)
        except EngineError as error:
            return [Result(work, error=str(error)) for work in works]
        results, row = [], 0
        for work in works:
            results.append(self._sample(work, logits[row : row + work.rows]))
            row += work.rows
        return results

    def _sample(self, work: Work, rows: torch.Tensor) -> Result:
        if work.rows == 0:
            return Result(work)
        session = work.session
        position = len(session.tokens)
        try:
            emitted = list(accept_chain(rows, position, work.proposals, session.sampling))
        except NonFiniteLogits as error:
            return Result(work, error=str(error))
        accepted = len(emitted) - 1
        session.sequence.truncate(position + accepted)
        return Result(work, Pass(tuple(emitted), drafted=len(work.proposals), accepted=accepted))
