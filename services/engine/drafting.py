"""How a model proposes: it continues sequences token by token, each token fed to its next pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from countersign.kernels.native.library import MAX_TOP_K
from countersign.services.engine.errors import ContextExceeded, InvalidSpan
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.model import Model
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.sampling import NOT_FINITE, Draws, Sampling, draw
from countersign.services.engine.step import Span, check_spans


@dataclass(frozen=True, slots=True)
class Ask:
    """A sequence to continue by up to ``count`` tokens: its tokens that are not in the cache, and how to draw.

    The noise is the request's own, at the absolute position of each proposed token, so that a draft that agrees with
    the target's logits proposes its very samples.
    """

    sequence: CachedSequence
    token_ids: Sequence[int]
    sampling: Sampling
    count: int


def propose(model: Model, cache: PagedCache, asks: Sequence[Ask], margin: float = 0.0) -> list[list[int]]:
    """The continuation of each sequence; the cache then holds all its tokens but the last drawn.

    Natively, a token whose score leads the next best by less than ``margin`` is the last of its sequence: the surer the
    draft, the longer.

    Raises:
        InvalidSpan, ContextExceeded, OutOfPages: as :meth:`Model.forward`, for all tokens that may come.
    """
    for ask in asks:
        _check(model, ask)
    asks = [_cheaply(ask, model.config.vocabulary_size) for ask in asks]
    if isinstance(model.executor, NativeExecutor):
        return _at_once(model, model.executor, cache, asks, margin)
    drafted: list[list[int]] = [[] for _ in asks]
    live = [(index, Span(ask.sequence, ask.token_ids)) for index, ask in enumerate(asks)]
    while live:
        logits = model.forward(cache, [span for _, span in live])
        draws = [Draws([span.sequence.length], asks[index].sampling) for index, span in live]
        going = []
        for (index, span), token in zip(live, draw(logits.cpu(), draws), strict=True):
            if token == NOT_FINITE:
                continue
            drafted[index].append(token)
            if len(drafted[index]) < asks[index].count:
                going.append((index, Span(span.sequence, [token])))
        live = going
    return drafted


def _at_once(
    model: Model, executor: NativeExecutor, cache: PagedCache, asks: Sequence[Ask], margin: float
) -> list[list[int]]:
    """All passes in one native call."""
    spans = [Span(ask.sequence, ask.token_ids) for ask in asks]
    check_spans(model.config, cache, spans)
    ends = [ask.sequence.length + len(ask.token_ids) for ask in asks]
    cache.reserve({ask.sequence: end + ask.count - 1 for ask, end in zip(asks, ends, strict=True)})
    draws = [Draws([end], ask.sampling) for ask, end in zip(asks, ends, strict=True)]
    drafted = executor.draft(cache, spans, draws, [ask.count for ask in asks], margin)
    for ask, end, tokens in zip(asks, ends, drafted, strict=True):
        ask.sequence.length = end + max(len(tokens) - 1, 0)
    return drafted


def _check(model: Model, ask: Ask) -> None:
    """Raises as :func:`propose` for what would go wrong only after some tokens."""
    if ask.count < 1:
        raise InvalidSpan(f"a sequence cannot be continued by {ask.count} tokens")
    # The last token drawn is not fed.
    end, limit = ask.sequence.length + len(ask.token_ids) + ask.count - 1, model.config.context_length
    if end > limit:
        raise ContextExceeded(end, limit)


def _cheaply(ask: Ask, vocabulary_size: int) -> Ask:
    """Without what costs a sort of the vocabulary: tokens outside it are rarely drawn, and never accepted."""
    rule = ask.sampling
    if rule.temperature == 0 or 0 < rule.top_k <= min(MAX_TOP_K, vocabulary_size - 1):
        return ask
    if rule.top_k == 0 and rule.top_p == 1:
        return ask
    return replace(ask, sampling=Sampling(rule.temperature, 0, 1.0, rule.seed))
