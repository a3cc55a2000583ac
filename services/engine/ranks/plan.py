"""What each rank computes, sends and folds in one step. Pure: every rank makes the same plan from the same spans.

Short spans (decode and verification): every rank computes all rows, attends to the keys that it keeps, and tells all
others its partials. Long spans (prefill): a rank computes the rows whose keys it keeps; in each layer their queries
travel round the ring, and partials go straight home (TokenRing, arXiv 2412.20501).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from countersign.kernels.merge import Node
from countersign.services.engine.ranks.placement import Placement, Run

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class SpanShape:
    """New tokens of a sequence, a chain: ``base`` before them, ``count``, of the last ``logits`` logits are wanted.
    ``long``: its rows are shared out.
    """

    base: int
    count: int
    logits: int
    long: bool


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive positions of a span that one rank computes; ``wanted``: of so many of the last, logits are wanted."""

    span: int
    positions: Run
    wanted: int

    @property
    def count(self) -> int:
        return self.positions.end - self.positions.first


@dataclass(frozen=True, slots=True)
class Task:
    """Rows of one rank over the keys of another: a partial for each row and node.

    ``units``: (n, 6) int32 for the C code, see kernels/native/ranks.h; rows count from the first of the query tensor,
    which holds the owner's long rows or all short ones. ``partials``: how many come out.
    """

    units: Ints
    partials: int


class StepPlan:
    """One step as rank ``rank`` sees it.

    ``short`` and ``long``: its rows, which stand in this order in its step. ``rings``: there are long spans.
    """

    def __init__(
        self, placement: Placement, spans: Sequence[SpanShape], rank: int, tile: int, window: int | None
    ) -> None:
        """``tile``: rows that the C code attends to at once."""
        self._placement, self._spans, self._tile, self._window = placement, spans, tile, window
        self.short = [
            Rows(index, Run(span.base, span.base + span.count), span.logits if rank == 0 else 0)
            for index, span in enumerate(spans)
            if not span.long
        ]
        self._long = [self._rows_of(owner) for owner in range(placement.ranks)]
        self.long = self._long[rank]
        self.rings = any(span.long for span in spans)

    def rows_of(self, owner: int) -> list[Rows]:
        """The long rows of a rank."""
        return self._long[owner]

    def count_of(self, owner: int) -> int:
        return sum(rows.count for rows in self._long[owner])

    @property
    def short_count(self) -> int:
        return sum(rows.count for rows in self.short)

    def short_task(self, holder: int) -> Task:
        """All short rows over the holder's keys."""
        return self._task(self.short, holder)

    def long_task(self, owner: int, holder: int) -> Task:
        """The owner's long rows over the holder's keys."""
        return self._task(self._long[owner], holder)

    def folds(self, rows: Sequence[Rows], bases: Sequence[int]) -> tuple[Ints, Ints]:
        """How to fold partials from all ranks into these rows: (parts (n, 3): level, index, place), (rows + 1) offsets.

        ``bases``: where each rank's partials begin, in the order of its task.
        """
        parts, counts = [], []
        begins = list(bases)
        for one in rows:
            held: list[tuple[Node, int]] = []
            for holder in range(self._placement.ranks):
                for node in self._nodes(one, holder):
                    held.append((node, begins[holder]))
                    begins[holder] += one.count
            held.sort(key=lambda pair: pair[0].first)
            known = np.array([(node.level, node.index, at) for node, at in held], dtype=np.int32)
            table = np.repeat(known[None], one.count, axis=0)
            table[:, :, 2] += np.arange(one.count, dtype=np.int32)[:, None]
            parts.append(table.reshape(-1, 3))
            counts += [len(held)] * one.count
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        return (np.concatenate(parts) if parts else np.zeros((0, 3), np.int32)), offsets

    def _rows_of(self, owner: int) -> list[Rows]:
        found: list[Rows] = []
        for index, span in enumerate(self._spans):
            if span.long:
                end = span.base + span.count
                runs = self._placement.runs(owner, span.base, end)
                found += [Rows(index, run, max(0, run.end - max(run.first, end - span.logits))) for run in runs]
        return found

    def _nodes(self, rows: Rows, holder: int) -> tuple[Node, ...]:
        low = 0 if self._window is None else max(0, rows.positions.first - self._window + 1)
        return self._placement.nodes(holder, rows.positions.end, low)

    def _task(self, rows: Sequence[Rows], holder: int) -> Task:
        units: list[tuple[int, int, int, int, int, int]] = []
        first = out = 0
        for one in rows:
            for node in self._nodes(one, holder):
                for row in range(0, one.count, self._tile):
                    count = min(self._tile, one.count - row)
                    units.append((first + row, count, one.span, node.first, node.last + 1, out + row))
                out += one.count
            first += one.count
        return Task(np.array(units, dtype=np.int32).reshape(-1, 6), out)
