"""Proposes tokens with the draft model. Blocking; one thread calls it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from countersign.services.engine.drafting import Ask as Continuation
from countersign.services.engine.drafting import propose
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model, Span
from countersign.services.engine.pages import PAGE_TOKENS
from countersign.services.engine.reuse import Reuse
from countersign.services.engine.sampling import Sampling

PREFILL_ROWS = 256


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence to continue: ``tokens`` are those from ``base`` on; ``count`` proposals at most."""

    request_id: str
    base: int
    tokens: tuple[int, ...]
    count: int
    sampling: Sampling
    tenant: str = ""


@dataclass(slots=True)
class Held:
    """What the draft holds of a request: its tokens, and their KV but for the last ones.

    ``exact``: so many of the first have the KV that a prefill gives; None for all.
    """

    sequence: CachedSequence
    tenant: str
    tokens: list[int] = field(default_factory=list)
    exact: int | None = None


class Proposer:
    """The draft's sequences, least recently asked first, over one paged cache."""

    def __init__(self, model: Model, cache: PagedCache, margin: float = 0.0, reuse: Reuse | None = None) -> None:
        """``reuse``: where the KV of requests that have ended goes, to be taken for others; None for nowhere."""
        self._model = model
        self._cache = cache
        self._margin = margin
        self._reuse = reuse
        self._held: OrderedDict[str, Held] = OrderedDict()

    @property
    def reused(self) -> int:
        """Tokens so far whose KV was taken from requests that have ended."""
        return 0 if self._reuse is None else self._reuse.reused

    @property
    def sequences(self) -> int:
        """Number of sequences held."""
        return len(self._held)

    def forget(self, request_id: str) -> None:
        """Drop a sequence; unknown ones are fine."""
        held = self._held.pop(request_id, None)
        if held is None:
            return
        if self._reuse is None:
            held.sequence.close()
        else:
            tokens = held.tokens[: held.sequence.length]
            exact = len(tokens) if held.exact is None else held.exact
            self._reuse.keep(held.sequence, tokens, exact, held.tenant)

    def propose(self, asks: Sequence[Ask]) -> list[tuple[int, ...] | int]:
        """One result an ask: the proposed tokens, or (an int) how many tokens are held when ``base`` is beyond them."""
        results: list[tuple[int, ...] | int] = [self._reconcile(ask) for ask in asks]
        live = [(i, ask) for i, ask in enumerate(asks) if ask.count and not isinstance(results[i], int)]
        fitting = self._fitting(live)
        if not fitting:
            return results
        for _, ask in fitting:
            self._prefill(self._held[ask.request_id])
        drafted = propose(self._model, self._cache, [self._continuation(ask) for _, ask in fitting], self._margin)
        for (i, ask), tokens in zip(fitting, drafted, strict=True):
            results[i] = tuple(tokens)
            self._held[ask.request_id].tokens += tokens
        return results

    def _reconcile(self, ask: Ask) -> tuple[int, ...] | int:
        """Make the held tokens those asked for, keeping the KV of the part that agrees."""
        held = self._held.get(ask.request_id)
        if held is None:
            if ask.base > 0:
                return 0
            held = self._held[ask.request_id] = Held(self._cache.sequence(), ask.tenant)
        self._held.move_to_end(ask.request_id)
        if ask.base > len(held.tokens):
            return len(held.tokens)
        tokens = [*held.tokens[: ask.base], *ask.tokens]
        if len(tokens) + ask.count > self._model.config.context_length or not tokens:
            return len(held.tokens)
        agree = ask.base + _common(held.tokens[ask.base :], ask.tokens)
        # The last token is always fed again: its logits are what the first proposal is drawn from.
        held.sequence.truncate(min(held.sequence.length, agree, len(tokens) - 1))
        held.tokens = tokens
        return ()

    def _prefill(self, held: Held) -> None:
        """Feed what is not in the cache yet, but for the last tokens."""
        if self._reuse is not None and not held.sequence.length:
            held.exact = self._reuse.fill(held.sequence, held.tokens[:-1], held.tenant)
        while len(held.tokens) - held.sequence.length > PREFILL_ROWS:
            start = held.sequence.length
            self._model.forward(self._cache, [Span(held.sequence, held.tokens[start : start + PREFILL_ROWS], 0)])

    def _continuation(self, ask: Ask) -> Continuation:
        held = self._held[ask.request_id]
        return Continuation(held.sequence, held.tokens[held.sequence.length :], ask.sampling, ask.count)

    def _fitting(self, live: list[tuple[int, Ask]]) -> list[tuple[int, Ask]]:
        """Those whose next tokens fit the cache, after dropping the sequences asked for longest ago."""
        asked = {ask.request_id for _, ask in live}
        fitting: list[tuple[int, Ask]] = []
        need = 0
        for i, ask in live:
            held = self._held[ask.request_id]
            need += len(held.tokens) - held.sequence.length + ask.count + PAGE_TOKENS
            while self._cache.free_tokens < need:
                if self._reuse is not None and self._reuse.drop():
                    continue
                stale = next((name for name in self._held if name not in asked), None)
                if stale is None:
                    return fitting
                self._held.pop(stale).sequence.close()
            fitting.append((i, ask))
        return fitting


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
