"""What one forward pass computes: new tokens of several sequences, laid out as flat rows and attention calls.

Linear layers see one row per new token of any sequence. Attention takes short spans (decode and verify) of similar
context together in one padded call, and long spans (prefill) alone in pieces of at most 256 rows. A tree of tokens is
taken path by path: the keys of a path stand in the order of their positions, with nothing between them, so that each
sum over them runs as it would had the path been decoded token by token.

That is :func:`plan`. Attention that reads the pages where they are needs none of it: :func:`plan_paged` only says who
sees what, trees included.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels.attention import Layout
from countersign.kernels.padded_attention import MAX_QUERIES, Mask, padded_keys, padded_queries
from countersign.services.engine.config import ModelConfig
from countersign.services.engine.errors import ContextExceeded, InvalidSpan
from countersign.services.engine.kv import CachedSequence, PagedCache
from countersign.services.engine.linear import padded_rows
from countersign.services.engine.pages import PAGE_TOKENS, pages_for

Ids: TypeAlias = NDArray[np.int64]
Numbers: TypeAlias = NDArray[np.integer[Any]]
Moved: TypeAlias = Callable[..., Tensor]

AfterLayer = Callable[[int], None]
"""Told in the model's thread that a layer of the pass is done: its K and V are written."""

MAX_TREE = MAX_QUERIES
"""The most tokens of one tree."""

SHORT = 16
"""The most rows of a span whose attention is taken together with others'."""


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens at the end of a sequence. The logits of the last ``logits`` of them are wanted.

    With ``parents`` they are a tree: parents[i] < i is the index in the span of token i's parent, -1 stands for the
    sequence's last token. Token i is stored in slot length + i; its position is length + its depth, that of a child of
    the sequence's last token being 0. It sees the sequence and its ancestors.
    """

    sequence: CachedSequence
    token_ids: Sequence[int]
    logits: int = 1
    parents: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Computed:
    """What a step gives, for the rows whose logits are wanted: spans in the order given, each in its own.

    logits: (n, vocabulary) fp32. states: (n, hidden) in the executor's type, after the final norm: what the head takes.
    They stand until the next step.
    """

    logits: Tensor
    states: Tensor


@dataclass(frozen=True, slots=True)
class Padding:
    """What sizes are rounded up to: rows of a linear layer, queries and keys of an attention call.

    ``whole``: a long chain is one attention call, however long, which needs no mask where no window cuts it. ``fold``:
    so many query heads of a key-value head stand in a call as rows beside each other, T fold rows in all.
    """

    rows: Callable[[int], int]
    queries: Callable[[int], int]
    keys: Callable[[int], int]
    whole: bool
    fold: int = 1


FIXED = Padding(padded_rows, padded_queries, padded_keys, whole=False)
"""The sizes at which a row's bits are its own."""

EXACT = Padding(lambda rows: rows, lambda queries: queries, lambda keys: pages_for(keys) * PAGE_TOKENS, whole=True)


@dataclass(frozen=True, slots=True)
class Tail:
    """Keys of tree tokens, one by one: (pieces, places) in a group's keys, (pages, offsets) in the pool."""

    pieces: Tensor
    places: Tensor
    pages: Tensor
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class Group:
    """One attention call: B pieces of T query rows over K keys each.

    rows: (B T) rows of the flat batch, padding rows 0; None for all in order. pages: (B K/16, rounded up), padding page
    0. tail: what to put over the keys of these pages, where there are trees. mask: None where the rows are the last T
    of exactly K tokens, each seeing all up to itself.
    """

    batch: int
    keys: int
    rows: Tensor | None
    pages: Tensor
    tail: Tail | None
    mask: Mask | None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of paged attention, for ``rows`` of the flat batch. leaf: positions of a leaf, where it gives partials;
    None for one softmax.
    """

    rows: slice
    layout: Layout
    leaf: int | None


@dataclass(frozen=True, slots=True)
class Splitting:
    """Which spans have their keys split into leaves of ``leaf`` positions, so that few rows keep a whole device busy:
    those of at most ``few`` rows, or all where that is None. partials: the most (rows x leaves) of one call, whose
    results take memory.
    """

    leaf: int
    few: int | None
    partials: int

    def leaf_of(self, span: Span) -> int | None:
        """The leaf of this span's attention; None for one softmax."""
        return self.leaf if self.few is None or len(span.token_ids) <= self.few else None

    def rows(self, spans: Sequence[Span]) -> int:
        """The most rows of one call on these spans."""
        longest = max(span.sequence.length + len(span.token_ids) for span in spans)
        return max(1, self.partials // -(-longest // self.leaf))


@dataclass(frozen=True, slots=True)
class Step:
    """A forward pass of M rows, padded to M'.

    token_ids: (M'), padding 0. positions: (M). end: above all positions. pages, offsets: (M), where each row's K and V
    go. logit_rows: (L'), the first ``logits`` of them wanted. groups or calls: what attention computes, padded or
    paged. take: (M') rows of their results laid end to end; None for all in order.
    """

    rows: int
    token_ids: Tensor
    positions: Tensor
    end: int
    pages: Tensor
    offsets: Tensor
    logits: int
    logit_rows: Tensor
    groups: list[Group] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    take: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one span that see the same keys, each up to its own position.

    rows: flat. positions: rising. table: the sequence's pages. slots: of a tree, the slot of each place from the first
    token of the span on; -1 where the path has ended.
    """

    rows: Ids
    positions: Ids
    table: NDArray[np.int32]
    first: int
    slots: Ids | None = None

    @property
    def keys(self) -> int:
        return int(self.positions[-1]) + 1


def depths(parents: Sequence[int]) -> list[int]:
    """How far each token of a tree stands behind the sequence's last."""
    found: list[int] = []
    for parent in parents:
        found.append(0 if parent < 0 else found[parent] + 1)
    return found


def check_spans(config: ModelConfig, cache: PagedCache, spans: Sequence[Span]) -> None:
    """Refuses what cannot be computed, before anything is.

    Raises:
        InvalidSpan: no span, no tokens, an id outside the vocabulary, more logits than tokens, parents that are no
            tree, a tree of more than 256 tokens, a sequence given twice, closed or of another cache.
        ContextExceeded: a token's position would be outside the model's context.
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
        new = len(span.token_ids)
        if span.parents is not None:
            _check_tree(span.parents, new)
            new = max(depths(span.parents)) + 1
        if span.sequence.length + new > config.context_length:
            raise ContextExceeded(span.sequence.length + new, config.context_length)


def _check_tree(parents: Sequence[int], tokens: int) -> None:
    if len(parents) != tokens or tokens > MAX_TREE:
        raise InvalidSpan(f"a tree has {tokens} tokens and {len(parents)} parents; at most {MAX_TREE}, one parent each")
    for child, parent in enumerate(parents):
        if not -1 <= parent < child:
            raise InvalidSpan(f"token {child} of a tree has parent {parent}, which is not before it")


def plan(cache: PagedCache, spans: Sequence[Span], window: int | None, padding: Padding, device: str) -> Step:
    """Lays the spans out. Their slots must be reserved. Tensors are on ``device``."""
    step, starts, moved = _laid_out(cache, spans, range(len(spans)), padding, device)
    rows = padding.rows(step.rows)
    groups, take, results = [], np.zeros(rows, dtype=np.int64), 0
    for pieces in _grouped(
        [piece for span, start in zip(spans, starts, strict=False) for piece in _pieces(cache, span, start, padding)],
        padding,
    ):
        queries = padding.queries(max(len(piece.rows) for piece in pieces))
        for index, piece in enumerate(pieces):
            take[piece.rows] = results + index * queries + np.arange(len(piece.rows))
        results += len(pieces) * queries
        if padding.whole and _is_plain(pieces, window):
            groups.append(_causal(pieces[0], step.rows, moved))
        else:
            groups.append(_group(pieces, queries, padding, window, cache.dtype, moved))
    return replace(step, groups=groups, take=None if results == rows and _in_order(take) else moved(take))


def plan_paged(cache: PagedCache, spans: Sequence[Span], splitting: Splitting, device: str) -> Step:
    """As :func:`plan`, for attention that reads the pages where they are: spans of one kind stand together, so that a
    call's rows do.
    """

    def kind(index: int) -> tuple[bool, bool]:
        return splitting.leaf_of(spans[index]) is None, spans[index].parents is not None

    order = sorted(range(len(spans)), key=kind)
    step, _, moved = _laid_out(cache, spans, order, EXACT, device)
    calls, start = [], 0
    for (one_softmax, _), members in groupby(order, kind):
        together = [spans[index] for index in members]
        for parts in _shared_out(together, step.rows if one_softmax else splitting.rows(together)):
            rows = slice(start, start + sum(part.count for part in parts))
            calls.append(Call(rows, _layout(cache, parts, moved), None if one_softmax else splitting.leaf))
            start = rows.stop
    return replace(step, calls=calls)


def _laid_out(
    cache: PagedCache, spans: Sequence[Span], order: Sequence[int], padding: Padding, device: str
) -> tuple[Step, Ids, Moved]:
    """The step without its attention, rows in this order of the spans; the first row of each span in it."""

    def moved(values: Numbers, size: int | None = None) -> Tensor:
        if size is not None:
            values = np.pad(values, (0, size - len(values)))
        return staged(values, device).to(device, non_blocking=True)

    laid = [spans[index] for index in order]
    token_ids = np.concatenate([np.asarray(span.token_ids, dtype=np.int64) for span in laid])
    starts = np.cumsum([0] + [len(span.token_ids) for span in laid])
    positions, pages, offsets = _places(cache, laid)
    stops = dict(zip(order, starts[1:], strict=True))
    logit_rows = np.concatenate([np.arange(stops[i] - span.logits, stops[i]) for i, span in enumerate(spans)])
    step = Step(
        rows=len(token_ids),
        token_ids=moved(token_ids, padding.rows(len(token_ids))),
        positions=moved(positions),
        end=int(positions.max()) + 1,
        pages=moved(pages),
        offsets=moved(offsets),
        logits=len(logit_rows),
        logit_rows=moved(logit_rows, padding.rows(len(logit_rows))),
    )
    return step, starts, moved


def staged(values: Numbers, device: str) -> Tensor:
    """The values where a copy to ``device`` starts from; one to an accelerator then waits for nothing."""
    tensor = torch.from_numpy(values)
    return tensor.pin_memory() if device.startswith("cuda") else tensor


def _places(cache: PagedCache, spans: Sequence[Span]) -> tuple[Ids, Ids, Ids]:
    """Each row's position, page and offset in the page."""
    positions, pages, offsets = [], [], []
    for span in spans:
        first = span.sequence.length
        slots = np.arange(first, first + len(span.token_ids))
        positions.append(slots if span.parents is None else first + np.asarray(depths(span.parents)))
        pages.append(cache.tables[span.sequence.row, slots // PAGE_TOKENS].astype(np.int64))
        offsets.append(slots % PAGE_TOKENS)
    return np.concatenate(positions), np.concatenate(pages), np.concatenate(offsets)


def _pieces(cache: PagedCache, span: Span, start: int, padding: Padding) -> Iterator[_Piece]:
    first, count = span.sequence.length, len(span.token_ids)
    table = cache.tables[span.sequence.row]
    if span.parents is None:
        most = count if padding.whole else MAX_QUERIES
        for offset in range(0, count, most):
            tokens = np.arange(offset, min(offset + most, count))
            yield _Piece(start + tokens, first + tokens, table, first)
        return
    for path, known in _paths(span.parents):
        slots = np.full(count, -1)
        slots[: len(path)] = first + path
        yield _Piece(start + path[known:], first + np.arange(known, len(path)), table, first, slots)


def _paths(parents: Sequence[int]) -> Iterator[tuple[Ids, int]]:
    """A path to each leaf, and how many of its first tokens an earlier path had."""
    seen: set[int] = set()
    for leaf in sorted(set(range(len(parents))) - set(parents)):
        path, node = [], leaf
        while node >= 0:
            path.append(node)
            node = parents[node]
        known = sum(node in seen for node in path)
        seen.update(path)
        yield np.array(path[::-1]), known


@dataclass(frozen=True, slots=True)
class _Part:
    """So many rows of a span from ``offset`` on."""

    span: Span
    offset: int
    count: int

    @property
    def base(self) -> int:
        return self.span.sequence.length + self.offset


def _shared_out(spans: Sequence[Span], most: int) -> Iterator[list[_Part]]:
    """All rows, in runs of at most ``most``; a tree stays whole."""
    run: list[_Part] = []
    room = most
    for span in spans:
        offset, whole = 0, span.parents is not None
        while left := len(span.token_ids) - offset:
            if run and (left > room if whole else not room):
                yield run
                run, room = [], most
            count = left if whole else min(left, room)
            run.append(_Part(span, offset, count))
            offset, room = offset + count, max(0, room - count)
    yield run


def _layout(cache: PagedCache, parts: Sequence[_Part], moved: Moved) -> Layout:
    """Chains only, or trees only."""
    longest = max(part.base + part.count for part in parts)
    first = np.cumsum([0] + [part.count for part in parts], dtype=np.int32)
    tables = cache.tables[[part.span.sequence.row for part in parts], : pages_for(longest)]
    parents = [part.span.parents for part in parts]
    return Layout(
        first=moved(first),
        base=moved(np.array([part.base for part in parts], dtype=np.int32)),
        tables=moved(np.ascontiguousarray(tables)),
        ancestors=moved(_ancestors([tree for tree in parents if tree is not None])) if any(parents) else None,
        longest=longest,
    )


def _ancestors(trees: Sequence[Sequence[int]]) -> NDArray[np.int32]:
    """(rows, words), as :class:`countersign.kernels.attention.Layout` takes them."""
    paths: list[int] = []
    for parents in trees:
        first = len(paths)
        for node, parent in enumerate(parents):
            paths.append((0 if parent < 0 else paths[first + parent]) | 1 << node)
    size = 4 * -(-max(map(len, trees)) // 32)
    packed = bytearray().join(path.to_bytes(size, "little") for path in paths)
    return np.frombuffer(packed, dtype="<i4").reshape(len(paths), -1)


def _grouped(pieces: Sequence[_Piece], padding: Padding) -> Iterator[list[_Piece]]:
    """Short pieces whose padded contexts lie within a factor of two together, others alone."""
    together: dict[int, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        if len(piece.rows) <= SHORT:
            together[padding.keys(piece.keys).bit_length()].append(piece)
        else:
            yield [piece]
    yield from together.values()


def _is_plain(pieces: list[_Piece], window: int | None) -> bool:
    """Whether this is one long chain that no window cuts."""
    first = pieces[0]
    return len(first.rows) > SHORT and first.slots is None and (window is None or first.keys <= window)


def _causal(piece: _Piece, rows: int, moved: Callable[[Ids], Tensor]) -> Group:
    pages = piece.table[: pages_for(piece.keys)].astype(np.int64)
    return Group(1, piece.keys, None if len(piece.rows) == rows else moved(piece.rows), moved(pages), None, None)


def _in_order(rows: Ids) -> bool:
    return bool((rows == np.arange(len(rows))).all())


def _group(
    pieces: list[_Piece],
    queries: int,
    padding: Padding,
    window: int | None,
    dtype: torch.dtype,
    moved: Callable[[Ids], Tensor],
) -> Group:
    keys = max(padding.keys(piece.keys) for piece in pieces)
    rows = np.zeros((len(pieces), queries), dtype=np.int64)
    positions = np.full((len(pieces), queries), -1, dtype=np.int64)
    pages = np.zeros((len(pieces), keys // PAGE_TOKENS), dtype=np.int64)
    for index, piece in enumerate(pieces):
        rows[index, : len(piece.rows)] = piece.rows
        positions[index, : len(piece.rows)] = piece.positions
        table = piece.table[: keys // PAGE_TOKENS]
        pages[index, : len(table)] = table
    mask = Mask.causal(moved(positions.repeat(padding.fold, axis=1)), keys, window, dtype)
    tail = _tail(pieces, keys, moved)
    return Group(len(pieces), keys, moved(rows.ravel()), moved(pages.ravel()), tail, mask)


def _tail(pieces: list[_Piece], keys: int, moved: Callable[[Ids], Tensor]) -> Tail | None:
    """Where a path has ended the page of zeros goes over other paths' keys, whose NaN would reach this one's rows."""
    columns: list[Ids] = []
    for index, piece in enumerate(pieces):
        if piece.slots is not None:
            slots = piece.slots[: keys - piece.first]
            places = piece.first + np.arange(len(slots))
            pages = np.where(slots < 0, 0, piece.table[slots // PAGE_TOKENS])
            offsets = np.where(slots < 0, 0, slots % PAGE_TOKENS)
            columns.append(np.stack([np.full(len(slots), index), places, pages, offsets]))
    return Tail(*(moved(column) for column in np.concatenate(columns, axis=1))) if columns else None
