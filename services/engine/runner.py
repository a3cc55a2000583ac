"""One forward pass over a batch: prefill, decode and verification together, then sampling. Blocking."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.services.engine.errors import EngineError, RankLost
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model
from countersign.services.engine.sampling import Allowed, Draws, Sampling, draw
from countersign.services.engine.speculation import Draft, walk
from countersign.services.engine.step import AfterLayer, Span

_NO_DRAFT = Draft()

Fingerprints = Callable[[Tensor], NDArray[np.float16]]
"""From the states (n, hidden) that the head takes to their fingerprints (n, k)."""


@dataclass(frozen=True, slots=True)
class Work:
    """Tokens of one sequence to compute: ``token_ids``, the next of those known, then the draft's proposals.

    ``samples``: all known tokens are then computed, and the next one is wanted. ``proves``: where it is not, whether
    the numbers are finite is. ``allowed``: None, or a mask or None for the token after the last known one and after
    each proposal (structured decoding).
    """

    sequence: CachedSequence
    token_ids: Sequence[int]
    sampling: Sampling = field(default_factory=Sampling)
    draft: Draft = _NO_DRAFT
    samples: bool = True
    proves: bool = False
    allowed: Sequence[Allowed | None] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """New tokens, how many of them are accepted proposals, and why the sequence cannot go on, if so.

    Tokens that come with an error stand before the failure and are good. ``sound``: the last known token's logits are
    known to be finite, and with them all numbers that it could see. ``fingerprints``: of each token that of the state
    it was sampled from, the one of the position before it; little-endian fp16; none where none are made.
    """

    token_ids: tuple[int, ...] = ()
    accepted: int = 0
    error: str = ""
    sound: bool = False
    fingerprints: tuple[bytes, ...] = ()


class Runner:
    """A model and its paged cache. ``fingerprints``: what makes them, None for none."""

    def __init__(self, model: Model, cache: PagedCache, fingerprints: Fingerprints | None = None) -> None:
        self.model, self.cache, self._fingerprints = model, cache, fingerprints

    def run(self, works: Sequence[Work], after_layer: AfterLayer | None = None) -> list[Outcome]:
        """Computes every work in one pass; each sequence then holds all its known tokens but the last sampled.

        Rejected proposals leave no KV. A sequence whose logits are not finite fails alone.

        Raises:
            RankLost: all KV is lost.
        """
        spans = [_span(work) for work in works]
        bases = [work.sequence.length for work in works]
        try:
            computed = self.model.compute(self.cache, spans, after_layer)
        except RankLost:
            raise
        except EngineError as error:
            return [Outcome(error=str(error))] * len(works)
        asks = [_draws(work, base) for work, base in zip(works, bases, strict=True) if work.samples]
        wanted, proofs = _parted(works, spans, computed.logits.cpu())
        prints = self._fingerprints_of(works, spans, computed.states)
        sampled, row, outcomes = self.sampled([work for work in works if work.samples], asks, wanted), 0, []
        for work, span, base in zip(works, spans, bases, strict=True):
            if not work.samples:
                outcomes.append(Outcome(sound=work.proves and bool(torch.isfinite(next(proofs)).all())))
                continue
            rows = len(work.draft) + 1
            outcomes.append(self._settle(work, span, base, sampled[row : row + rows], prints[row : row + rows]))
            row += rows
        return outcomes

    def sampled(self, works: Sequence[Work], asks: Sequence[Draws], logits: Tensor) -> list[int]:  # noqa: ARG002  for subclasses
        """The token of each row of the logits (R, vocabulary), or NOT_FINITE: a row a work, and one a proposal."""
        return draw(logits, asks, self.model.team)

    def _fingerprints_of(self, works: Sequence[Work], spans: Sequence[Span], states: Tensor) -> Sequence[bytes]:
        """Of each row that is sampled from; none where none are made."""
        if self._fingerprints is None:
            return ()
        wanted, _ = _parted(works, spans, states)
        found = self._fingerprints(wanted)
        data, size = found.astype("<f2", copy=False).tobytes(), 2 * found.shape[1]
        return [data[at : at + size] for at in range(0, len(data), size)]

    def _settle(
        self, work: Work, span: Span, base: int, sampled: Sequence[int], prints: Sequence[bytes] = ()
    ) -> Outcome:
        walked = walk(work.draft, sampled)
        error = "" if walked.finite else self._failure(span, base + len(work.token_ids) + len(walked.path))
        fed = len(work.token_ids)
        if work.draft.parents is None:
            work.sequence.truncate(base + fed + len(walked.path))
        else:
            work.sequence.compact(base, [*range(fed), *(fed + node for node in walked.path)])
        rows = (0, *(1 + node for node in walked.path))[: len(walked.token_ids)]
        return Outcome(
            walked.token_ids,
            len(walked.path),
            error,
            sound=not error,
            fingerprints=tuple(prints[row] for row in rows) if prints else (),
        )

    def _failure(self, span: Span, position: int) -> str:
        layer, layers = self.model.first_bad_layer(self.cache, span), self.model.config.layers
        where = f"layer {layer} of {layers}" if layer < layers else "the output head"
        return (
            f"the logits for the token at position {position} are not finite; the first bad numbers come from {where}"
        )


def _span(work: Work) -> Span:
    fed, draft = len(work.token_ids), work.draft
    parents = None
    if draft.parents is not None:
        parents = [*range(-1, fed - 1), *(fed + parent for parent in draft.parents)]
    logits = len(draft) + 1 if work.samples else int(work.proves)
    return Span(work.sequence, [*work.token_ids, *draft.token_ids], logits, parents)


def _parted(works: Sequence[Work], spans: Sequence[Span], wanted: Tensor) -> tuple[Tensor, Iterator[Tensor]]:
    """The rows to sample from, and one row of each work that proves."""
    if not any(work.proves for work in works):
        return wanted, iter(())
    parts = torch.split(wanted, [span.logits for span in spans])
    sampled = [part for work, part in zip(works, parts, strict=True) if work.samples]
    proofs = [part[0] for work, part in zip(works, parts, strict=True) if work.proves]
    return torch.cat(sampled) if sampled else wanted[:0], iter(proofs)


def _draws(work: Work, base: int) -> Draws:
    first = base + len(work.token_ids)
    positions = [first, *(first + 1 + depth for depth in work.draft.depths())]
    return Draws(positions, work.sampling, work.allowed)
