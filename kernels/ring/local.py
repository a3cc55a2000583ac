"""One rank's attention over the keys it has, and the torch reference of it.

For a row with query q (Hq, D) and keys k_j, v_j (Hkv, D), query head h reading key head h // (Hq / Hkv):

    s_j = scale * q . k_j,  lse = log(sum_j exp(s_j)),  out = sum_j exp(s_j - lse) v_j

over those of the piece's positions that the row sees. A piece of a node is computed leaf by leaf, in products of one
shape whatever else there is: a tile of TILE rows, each at place position mod TILE, and a leaf of keys, each at its
place. Rows and keys that are not there are zeros. So a row's bits depend on its own keys only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from countersign.kernels.merge import tree
from countersign.kernels.ring.layout import Extent, Layout, Part, Piece
from countersign.kernels.ring.partition import Range, Ranges, join
from countersign.kernels.ring.table import Table

TILE = 16
BLOCK = 512
"""Rows attended at once where no leaf is asked for; bounds the scores' memory."""

Partial = tuple[Tensor, Tensor]


class Local(Protocol):
    """Computes what a step asks of a rank."""

    def __call__(self, pieces: Sequence[Piece], queries: Table, keys: Table, values: Table) -> list[Partial]:
        """Out (rows, Hq, D) and lse (rows, Hq) of each piece, fp32 (fp64 for fp64 inputs); lse in natural log.

        Args:
            pieces: what to compute.
            queries: rows (n, Hq, D): this rank's and those received last.
            keys: slots (m, Hkv, D): likewise.
            values: as keys.
        """


@dataclass(frozen=True, slots=True)
class Reference:
    """The readable one, for any device."""

    layout: Layout
    scale: float

    def __call__(self, pieces: Sequence[Piece], queries: Table, keys: Table, values: Table) -> list[Partial]:
        return [
            self._dense(piece, queries, keys, values)
            if piece.node is None
            else self._node(piece, queries, keys, values)
            for piece in pieces
        ]

    def _dense(self, piece: Piece, queries: Table, keys: Table, values: Table) -> Partial:
        """All of the piece's keys at once."""
        sequence, extent = piece.rows.sequence, self.layout.extents[piece.rows.sequence]
        slots = _slots(extent, piece.keys)
        parts = [Part(sequence, part.first, part.end) for part in slots]
        k, v = keys.take(parts), values.take(parts)
        found = []
        for first in range(piece.rows.first, piece.rows.end, BLOCK):
            rows = Part(sequence, first, min(first + BLOCK, piece.rows.end))
            hidden = _hidden(extent, rows, slots, self.layout.window)
            found.append(attend(queries.take([rows]), k, v, hidden.to(k.device), self.scale))
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    def _node(self, piece: Piece, queries: Table, keys: Table, values: Table) -> Partial:
        """Leaf by leaf, folded."""
        extent = self.layout.extents[piece.rows.sequence]
        leaves = _Leaves(piece.rows.sequence, extent, self.layout.leaf or 0, keys, values)
        found = []
        for rows in _tiles(extent, piece.rows):
            positions = torch.tensor([extent.position(row) for row in rows])
            q = queries.take([Part(piece.rows.sequence, rows.start, rows.stop)])
            tile = _placed(q, positions % TILE, TILE)
            at = torch.full((TILE,), -1).index_copy_(0, positions % TILE, positions)
            partials = [self._leaf(tile, at, *leaves.take(first, rows.start)) for first in leaves.of(piece)]
            out, lse = tree(*(torch.stack(parts) for parts in zip(*partials, strict=True)))
            places = (positions % TILE).to(q.device)
            found.append((out[places], lse[places]))
        return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])

    def _leaf(self, tile: Tensor, at: Tensor, first: int, k: Tensor, v: Tensor) -> Partial:
        """The partial of a tile's rows, at positions ``at`` (-1: no row), over the leaf that starts at ``first``."""
        key = torch.arange(first, first + len(k))
        hidden = _unseen(at, key, self.layout.window)
        return attend(tile, k, v, hidden.to(k.device), self.scale)


@dataclass(slots=True)
class _Leaves:
    """A sequence's leaves of keys and values, each (leaf, Hkv, D), a key at the place of its position."""

    sequence: int
    extent: Extent
    size: int
    keys: Table
    values: Table
    shared: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def of(self, piece: Piece) -> range:
        """The first position of each of the piece's leaves."""
        return range(piece.keys[0].first, piece.keys[-1].end, self.size)

    def take(self, first: int, row: int) -> tuple[int, Tensor, Tensor]:
        """The leaf at ``first`` as ``row`` sees it: in a tree, what comes after the cached tokens is the row's path."""
        if self.extent.parents is not None and first + self.size > self.extent.cached:
            return (first, *self._gather(first, row))
        if first not in self.shared:
            self.shared[first] = self._gather(first, row)
        return (first, *self.shared[first])

    def _gather(self, first: int, row: int) -> tuple[Tensor, Tensor]:
        cached, end = self.extent.cached, first + self.size
        if self.extent.parents is None:
            parts = [Part(self.sequence, first, min(end, self.extent.length))]
        else:
            known = Range(0, cached).clip(first, end)
            path = self.extent.path(row)[max(0, first - cached) : max(0, end - cached)]
            parts = [Part(self.sequence, known.first, known.end), *(Part(self.sequence, s, s + 1) for s in path)]
        k, v = self.keys.take(parts), self.values.take(parts)
        places = torch.arange(len(k))
        return _placed(k, places, self.size), _placed(v, places, self.size)


def attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> Partial:
    """Q (R, Hq, D), k and v (M, Hkv, D), hidden (R, M) to out (R, Hq, D), lse (R, Hq); see the module's docstring."""
    (rows, heads, dim), kv_heads = q.shape, k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    if not len(k):
        return q.new_zeros(q.shape, dtype=wide), q.new_full((rows, heads), -torch.inf, dtype=wide)
    group = heads // kv_heads
    q = (q.to(wide) * scale).view(rows, kv_heads, group, dim).transpose(0, 1).reshape(kv_heads, rows * group, dim)
    k, v = (x.to(wide).transpose(0, 1).contiguous() for x in (k, v))
    scores = (q @ k.transpose(1, 2)).masked_fill_(hidden.repeat_interleave(group, 0), -torch.inf)
    largest = scores.amax(-1, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0)
    weights = torch.exp(scores - largest)
    total = weights.sum(-1, keepdim=True)
    out = (weights @ v) / total.masked_fill(total == 0, 1)
    lse = largest + torch.log(total)
    return (
        out.view(kv_heads, rows, group, dim).transpose(0, 1).reshape(rows, heads, dim),
        lse.view(kv_heads, rows, group).transpose(0, 1).reshape(rows, heads),
    )


def _tiles(extent: Extent, rows: Part) -> Iterator[range]:
    """Runs of rows that share their keys, each row with a place of its own; a tree's rows are alone."""
    if extent.parents is not None:
        yield from (range(row, row + 1) for row in range(rows.first, rows.end))
        return
    first = rows.first
    while first < rows.end:
        end = min(rows.end, first + TILE - (extent.cached + first) % TILE)
        yield range(first, end)
        first = end


def _placed(tensor: Tensor, places: Tensor, count: int) -> Tensor:
    """The rows at their places of ``count``, zeros elsewhere."""
    return tensor.new_zeros((count, *tensor.shape[1:])).index_copy_(0, places.to(tensor.device), tensor)


def _slots(extent: Extent, owned: Ranges) -> Ranges:
    """Where the keys of owned positions stand; in a tree several may stand at one."""
    if extent.parents is None:
        return owned
    known = [part.clip(0, extent.cached) for part in owned]
    tail = [
        Range(extent.cached + row, extent.cached + row + 1)
        for row in range(extent.new)
        if any(part.first <= extent.position(row) < part.end for part in owned)
    ]
    return join((*known, *tail))


def _hidden(extent: Extent, rows: Part, slots: Ranges, window: int | None) -> Tensor:
    """(rows, slots): whether a row does not see the key in a slot."""
    slot = torch.cat([torch.arange(part.first, part.end) for part in slots]) if slots else torch.arange(0)
    if extent.parents is None:
        return _unseen(torch.arange(rows.first, rows.end) + extent.cached, slot, window)
    position = torch.tensor([extent.position(row) for row in range(extent.new)])
    key = torch.where(slot < extent.cached, slot, position[(slot - extent.cached).clamp(min=0)])
    hidden = _unseen(position[rows.first : rows.end], key, window)
    for i, row in enumerate(range(rows.first, rows.end)):
        hidden[i] |= (slot >= extent.cached) & ~torch.isin(slot, torch.tensor(extent.path(row)))
    return hidden


def _unseen(at: Tensor, key: Tensor, window: int | None) -> Tensor:
    """(rows, keys): whether a row at a position does not see a key at another of its own path."""
    hidden = key > at[:, None]
    return hidden | (key <= at[:, None] - window) if window else hidden
