"""What one forward pass computes: new tokens of several sequences, laid out as flat rows and attention calls.

Linear layers see one row per new token of any sequence. Attention takes short spans (decode and verify) of similar
context together in one padded call, and long spans (prefill) alone in pieces of at most 256 rows.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from countersign.kernels.attention import MAX_QUERIES, Mask, padded_keys, padded_queries
from countersign.services.engine.config import ModelConfig
from countersign.services.engine.errors import ContextExceeded, InvalidSpan
from countersign.services.engine.kv import PAGE_TOKENS, CachedSequence, PagedCache
from countersign.services.engine.linear import padded_rows

_SHORT = 16


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens at the end of a sequence. The logits of the last ``logits`` of them are wanted."""

    sequence: CachedSequence
    token_ids: Sequence[int]
    logits: int = 1


@dataclass(frozen=True, slots=True)
class Group:
    """One attention call: B pieces of T query rows over K keys each.

    rows: (B T) rows of the flat batch, padding rows 0. pages: (B K/16), padding page 0.
    """

    batch: int
    keys: int
    rows: Tensor
    pages: Tensor
    mask: Mask


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass of M rows, padded to M'.

    token_ids: (M'), padding 0. positions, slots: (M), a slot being page * 16 + place. end: above all positions. take:
    (M') rows of the groups' results laid end to end. logit_rows: (L'), the first ``logits`` of them wanted.
    """

    rows: int
    token_ids: Tensor
    positions: Tensor
    slots: Tensor
    end: int
    groups: list[Group]
    take: Tensor
    logits: int
    logit_rows: Tensor


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive rows of one span: its first flat row, its first position, how many, and the sequence's pages."""

    row: int
    position: int
    count: int
    pages: list[int]

    @property
    def keys(self) -> int:
        return padded_keys(self.position + self.count)


def check_spans(config: ModelConfig, cache: PagedCache, spans: Sequence[Span]) -> None:
    """Refuses what cannot be computed, before anything is.

    Raises:
        InvalidSpan: no span, no tokens, an id outside the vocabulary, more logits than tokens, a sequence given
        twice, closed
            or of another cache.
        ContextExceeded: a sequence would be longer than the model's context.
    """
    if not spans:
        raise InvalidSpan("a forward pass needs at least one span")
    if len({span.sequence for span in spans}) < len(spans):
        raise InvalidSpan("a sequence is given twice")
    for span in spans:
        if not cache.holds(span.sequence):
            raise InvalidSpan("a sequence is closed or of another cache")
        if not span.token_ids or not 0 <= span.logits <= len(span.token_ids):
            raise InvalidSpan(f"a span has {len(span.token_ids)} tokens and wants {span.logits} rows of logits")
        if min(span.token_ids) < 0 or max(span.token_ids) >= config.vocabulary_size:
            raise InvalidSpan(f"a token id is outside the vocabulary of {config.vocabulary_size}")
        length = span.sequence.length + len(span.token_ids)
        if length > config.context_length:
            raise ContextExceeded(length, config.context_length)


def plan(spans: Sequence[Span], window: int | None, dtype: torch.dtype) -> Step:
    """Lays the spans out. Their pages must be reserved."""
    token_ids = np.concatenate([np.asarray(span.token_ids, dtype=np.int64) for span in spans])
    starts = np.cumsum([0] + [len(span.token_ids) for span in spans])
    rows = len(token_ids)
    positions, slots = _places(spans)
    wanted = [np.arange(stop - span.logits, stop) for span, stop in zip(spans, starts[1:], strict=True)]
    logit_rows = np.concatenate(wanted)
    groups, take, results = [], np.zeros(padded_rows(rows), dtype=np.int64), 0
    for pieces in _grouped(spans, starts):
        group, places = _group(pieces, window, dtype)
        for place, piece in zip(places, pieces, strict=True):
            take[piece.row : piece.row + piece.count] = np.arange(piece.count) + results + place
        results += len(group.rows)
        groups.append(group)
    return Step(
        rows=rows,
        token_ids=_padded(token_ids, padded_rows(rows)),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        end=int(positions.max()) + 1,
        groups=groups,
        take=torch.from_numpy(take),
        logits=len(logit_rows),
        logit_rows=_padded(logit_rows, padded_rows(len(logit_rows))),
    )


def _places(spans: Sequence[Span]) -> tuple[np.ndarray, np.ndarray]:
    positions, slots = [], []
    for span in spans:
        first = span.sequence.length
        position = np.arange(first, first + len(span.token_ids))
        pages = np.asarray(span.sequence.pages, dtype=np.int64)
        positions.append(position)
        slots.append(pages[position // PAGE_TOKENS] * PAGE_TOKENS + position % PAGE_TOKENS)
    return np.concatenate(positions), np.concatenate(slots)


def _grouped(spans: Sequence[Span], starts: np.ndarray) -> Iterator[list[_Piece]]:
    """Short spans whose padded contexts lie within a factor of two together, others in pieces alone."""
    together: dict[int, list[_Piece]] = defaultdict(list)
    for span, start in zip(spans, starts, strict=False):
        count, first = len(span.token_ids), span.sequence.length
        if count <= _SHORT:
            piece = _Piece(int(start), first, count, span.sequence.pages)
            together[piece.keys.bit_length()].append(piece)
            continue
        for offset in range(0, count, MAX_QUERIES):
            rows = min(MAX_QUERIES, count - offset)
            yield [_Piece(int(start) + offset, first + offset, rows, span.sequence.pages)]
    yield from together.values()


def _group(pieces: list[_Piece], window: int | None, dtype: torch.dtype) -> tuple[Group, list[int]]:
    """The call, and where each piece's rows start in its result."""
    queries = padded_queries(max(piece.count for piece in pieces))
    keys = max(piece.keys for piece in pieces)
    rows = np.zeros((len(pieces), queries), dtype=np.int64)
    positions = np.full((len(pieces), queries), -1, dtype=np.int64)
    pages = np.zeros((len(pieces), keys // PAGE_TOKENS), dtype=np.int64)
    for i, piece in enumerate(pieces):
        rows[i, : piece.count] = np.arange(piece.row, piece.row + piece.count)
        positions[i, : piece.count] = np.arange(piece.position, piece.position + piece.count)
        table = piece.pages[: keys // PAGE_TOKENS]
        pages[i, : len(table)] = table
    mask = Mask.causal(torch.from_numpy(positions), keys, window, dtype)
    group = Group(len(pieces), keys, torch.from_numpy(rows.ravel()), torch.from_numpy(pages.ravel()), mask)
    return group, [i * queries for i in range(len(pieces))]


def _padded(values: np.ndarray, size: int) -> Tensor:
    padded = np.zeros(size, dtype=np.int64)
    padded[: len(values)] = values
    return torch.from_numpy(padded)
