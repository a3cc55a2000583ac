"""A batch cut over ranks: who holds which keys and which rows, and which rows a rank's keys can matter to.

A sequence has ``cached`` tokens and ``new`` ones, which are this call's rows. Keys stand in slots 0 .. cached + new -
1; a row's *position* is its slot, but in a tree (``parents``) it is cached + depth, so that a path has the positions of
plain text. Ranks own positions. A rank that owns a position from ``cached`` on in a tree holds all the tree's keys,
as only a row's path tells which of them stands at a position.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from countersign.kernels.merge import Node, nodes_of
from countersign.kernels.ring.errors import LayoutError
from countersign.kernels.ring.partition import Range, Ranges, check_cut, extend


@dataclass(frozen=True, slots=True)
class Extent:
    """A sequence's tokens. ``parents[i] < i`` is the new token before new token i, -1 the last cached one; without
    parents it is i - 1.
    """

    cached: int
    new: int
    parents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.cached < 0 or self.new < 0:
            raise LayoutError(f"{self.cached} cached and {self.new} new tokens: neither may be negative")
        if self.parents is not None and (
            len(self.parents) != self.new or any(not -1 <= parent < i for i, parent in enumerate(self.parents))
        ):
            raise LayoutError(f"parents {self.parents} must name an earlier new token, or -1, for each of {self.new}")

    def path(self, row: int) -> list[int]:
        """The slots of the new tokens that ``row`` sees, itself last: at positions cached, cached + 1, ..."""
        if self.parents is None:
            return list(range(self.cached, self.cached + row + 1))
        slots = []
        while row >= 0:
            slots.append(self.cached + row)
            row = self.parents[row]
        return slots[::-1]

    def position(self, row: int) -> int:
        return self.cached + (row if self.parents is None else len(self.path(row)) - 1)

    @property
    def length(self) -> int:
        """The number of positions."""
        return max((self.position(row) + 1 for row in self._ends()), default=self.cached)

    def _ends(self) -> Iterable[int]:
        return range(self.new) if self.parents is not None else range(self.new)[-1:]

    def seeing(self, rows: Range, first: int, end: int, window: int | None) -> Range:
        """The rows of ``rows`` from the first to the last that may see a position in [first, end)."""
        if self.parents is None:
            until = end - 1 - self.cached + window if window else rows.end
            return rows.clip(first - self.cached, until)
        seen = [row for row in range(rows.first, rows.end) if self.position(row) >= first]
        return Range(seen[0], seen[-1] + 1) if seen else Range(rows.first, rows.first)


@dataclass(frozen=True, slots=True, order=True)
class Part:
    """Rows (counted from the first new token) or slots [first, end) of a sequence of the batch."""

    sequence: int
    first: int
    end: int

    def __len__(self) -> int:
        return self.end - self.first


Parts = tuple[Part, ...]


def count(parts: Iterable[Part]) -> int:
    return sum(len(part) for part in parts)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows attending to some positions of their sequence: one partial (out, lse) a row.

    With ``node`` the partial is that of the canonical tree's node, computed leaf by leaf; without, all of ``keys`` at
    once.
    """

    rows: Part
    keys: Ranges
    node: Node | None


@dataclass(frozen=True, slots=True)
class Layout:
    """A batch over ranks. ``keys[rank][sequence]``: the positions owned. ``rows[rank][sequence]``: the rows whose query
    the rank has and whose result it wants; None: every rank has every row and wants every result.

    Args:
        leaf: the size of a leaf: partials are those of the canonical tree, so that results are the same bits however
            the batch is cut. None: one partial a rank, merged in the order of ranks: fewer bytes, other bits.
        window: a row at position p sees positions above p - window only; None: all.

    Raises:
        LayoutError: a position or row has two owners or none, or a leaf is split between ranks.
    """

    extents: tuple[Extent, ...]
    keys: tuple[tuple[Ranges, ...], ...]
    rows: tuple[tuple[Ranges, ...], ...] | None
    leaf: int | None
    window: int | None = None

    def __post_init__(self) -> None:
        for sequence, extent in enumerate(self.extents):
            self._check("positions", sequence, [mine[sequence] for mine in self.keys], extent.length)
            if self.rows is not None:
                self._check("rows", sequence, [mine[sequence] for mine in self.rows], extent.new)
            bounds = {edge for mine in self.keys for part in mine[sequence] for edge in (part.first, part.end)}
            if self.leaf and any(edge % self.leaf for edge in bounds - {extent.length}):
                raise LayoutError(
                    f"sequence {sequence}: ranks meet inside a leaf of {self.leaf} positions: {sorted(bounds)}"
                )

    @staticmethod
    def _check(what: str, sequence: int, held: Sequence[Ranges], length: int) -> None:
        try:
            found = check_cut(held)
        except LayoutError as error:
            raise LayoutError(f"{what} of sequence {sequence}: {error}") from error
        if found != length:
            raise LayoutError(f"the ranks hold {found} {what} of sequence {sequence}, which has {length}")

    @property
    def size(self) -> int:
        """The number of ranks."""
        return len(self.keys)

    def rows_of(self, rank: int) -> Parts:
        """The rows whose queries ``rank`` has, in the order of its query tensor."""
        if self.rows is None:
            return tuple(Part(i, 0, extent.new) for i, extent in enumerate(self.extents) if extent.new)
        return tuple(Part(i, part.first, part.end) for i, mine in enumerate(self.rows[rank]) for part in mine)

    def slots_of(self, rank: int) -> Parts:
        """The slots whose keys and values ``rank`` has, in the order of its key tensor."""
        return self._slots((i, part) for i, mine in enumerate(self.keys[rank]) for part in mine)

    def pieces(self, owner: int, holder: int) -> tuple[Piece, ...]:
        """What ``holder`` computes for the rows of ``owner``."""
        found = []
        for rows in self.rows_of(owner):
            for keys, node in self._units(rows.sequence, holder):
                seeing = self._seeing(rows, keys)
                if seeing:
                    seen = tuple(part for part in keys if self._seeing(rows, (part,)))
                    found.append(Piece(seeing, seen, node))
        return tuple(found)

    def rows_for(self, owner: int, holders: Iterable[int]) -> Parts:
        """The rows of ``owner`` that the keys of any of ``holders`` can matter to, as one run in each of its parts."""
        holders = list(holders)
        found = []
        for rows in self.rows_of(owner):
            keys = tuple(part for holder in holders for part in self.keys[holder][rows.sequence])
            found.append(self._seeing(rows, keys))
        return tuple(part for part in found if part)

    def slots_for(self, holder: int, owners: Iterable[int]) -> Parts:
        """The slots of ``holder`` that matter to any row of ``owners``."""
        rows = [part for owner in owners for part in self.rows_of(owner)]
        return self._slots(
            (sequence, part)
            for sequence, mine in enumerate(self.keys[holder])
            for part in mine
            if any(row.sequence == sequence and self._seeing(row, (part,)) for row in rows)
        )

    def _units(self, sequence: int, holder: int) -> list[tuple[Ranges, Node | None]]:
        """The keys of one partial each: a node's, or in fast mode all that the holder has."""
        mine, length = self.keys[holder][sequence], self.extents[sequence].length
        if self.leaf is None:
            return [(mine, None)] if mine else []
        leaf, leaves = self.leaf, -(-length // self.leaf)
        nodes = [node for part in mine for node in nodes_of(part.first // leaf, -(-part.end // leaf), leaves)]
        return [((Range(node.first * leaf, min((node.last + 1) * leaf, length)),), node) for node in nodes]

    def _seeing(self, rows: Part, keys: Ranges) -> Part:
        """The run of ``rows`` from the first to the last that may see any of ``keys``."""
        extent, own = self.extents[rows.sequence], Range(rows.first, rows.end)
        seen = [part for key in keys if (part := extent.seeing(own, key.first, key.end, self.window))]
        if not seen:
            return Part(rows.sequence, rows.first, rows.first)
        return Part(rows.sequence, min(part.first for part in seen), max(part.end for part in seen))

    def _slots(self, owned: Iterable[tuple[int, Range]]) -> Parts:
        """Where owned positions stand: a tree's new ones may be any of its new slots."""
        found: dict[Part, None] = {}
        for sequence, part in owned:
            extent = self.extents[sequence]
            if extent.parents is None or part.end <= extent.cached:
                found[Part(sequence, part.first, part.end)] = None
                continue
            known = part.clip(0, extent.cached)
            if known:
                found[Part(sequence, known.first, known.end)] = None
            found[Part(sequence, extent.cached, extent.cached + extent.new)] = None
        return tuple(found)


def lay_out(
    extents: Sequence[Extent],
    size: int,
    *,
    held: Sequence[Sequence[Ranges]] | None = None,
    replicated: bool = False,
    leaf: int | None = None,
    window: int | None = None,
) -> Layout:
    """A batch whose new positions are cut by zigzag, a begun leaf staying where it is.

    Args:
        extents: the sequences.
        size: the number of ranks.
        held: ``held[rank][sequence]``, the cached positions that each rank has; None: cut by zigzag too.
        replicated: every rank has all rows. Otherwise a row is where its position is, a tree's rows all with the first.
        leaf: see :class:`Layout`.
        window: see :class:`Layout`.

    Raises:
        LayoutError: ``held`` does not fit the extents.
    """
    align = leaf or 1
    keys, rows = [], []
    for i, extent in enumerate(extents):
        cached = [mine[i] for mine in held] if held else extend([()] * size, extent.cached, align)
        whole = extend(cached, extent.length, align)
        keys.append(whole)
        if extent.parents is None:
            new = [[part.clip(extent.cached, extent.length) for part in mine] for mine in whole]
            rows.append([tuple(Range(p.first - extent.cached, p.end - extent.cached) for p in n if p) for n in new])
        else:
            first = [any(part.clip(extent.cached, extent.cached + 1) for part in mine) for mine in whole]
            rows.append([(Range(0, extent.new),) if here else () for here in first])
    by_rank = tuple(tuple(ranges) for ranges in zip(*keys, strict=True)) or ((),) * size
    rows_by_rank = tuple(tuple(ranges) for ranges in zip(*rows, strict=True)) or ((),) * size
    return Layout(tuple(extents), by_rank, None if replicated else rows_by_rank, leaf, window)
