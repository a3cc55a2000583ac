"""One rank: its part of the model's pages, and what it does in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from countersign.kernels.ring.transport import Receive, Send, Transport
from countersign.services.engine.kv import LocalPages
from countersign.services.engine.native import NativeExecutor
from countersign.services.engine.ranks.placement import Placement, Run
from countersign.services.engine.ranks.plan import Ints, Rows, SpanShape, StepPlan, Task
from countersign.services.engine.ranks.shard import Partials, ShardCache, ShardStep
from countersign.services.engine.step import Computed


@dataclass(frozen=True, slots=True)
class Step:
    """The same for all ranks. ``tables``: (spans, columns) int32, all pages; ``diagnose``: see :meth:`Rank.run`."""

    spans: Sequence[SpanShape]
    token_ids: Sequence[Sequence[int]]
    tables: NDArray[np.int32]
    diagnose: bool = False


@dataclass(frozen=True, slots=True)
class Sent:
    """Bytes that left a rank: queries passed on to the next one, and partials sent home to those who asked."""

    forward: int = 0
    back: int = 0

    def __add__(self, other: Sent) -> Sent:
        return Sent(self.forward + other.forward, self.back + other.back)


NOTHING = Sent()


@dataclass(frozen=True, slots=True)
class Result:
    """The rank's wanted rows: (span, first position, how many) in order, their logits (n, vocabulary) and states (n,
    hidden). ``bad_layer``: the first whose output is not finite here, -1 for none. ``sent``: what it took.
    """

    rows: Sequence[tuple[int, int, int]]
    logits: NDArray[np.float32]
    states: NDArray[np.float32]
    bad_layer: int = -1
    sent: Sent = NOTHING


def join(results: Sequence[Result]) -> Computed:
    """All rows in the order of the spans and of their positions."""
    pieces: list[tuple[int, int, Result, slice]] = []
    for result in results:
        at = 0
        for span, position, count in result.rows:
            pieces.append((span, position, result, slice(at, at + count)))
            at += count
    pieces.sort(key=lambda piece: piece[:2])
    if not pieces:
        return Computed(torch.from_numpy(results[0].logits), torch.from_numpy(results[0].states))
    logits = np.concatenate([result.logits[rows] for *_, result, rows in pieces])
    states = np.concatenate([result.states[rows] for *_, result, rows in pieces])
    return Computed(torch.from_numpy(logits), torch.from_numpy(states))


@dataclass(frozen=True, slots=True)
class _Fold:
    parts: Ints
    offsets: Ints


class Rank:
    """A model whose keys are spread over ranks, as one of them runs it."""

    def __init__(
        self, executor: NativeExecutor, pages: LocalPages, placement: Placement, transport: Transport, timeout: float
    ) -> None:
        """``timeout``: seconds that an exchange with the others may take."""
        self._executor, self._placement, self._transport = executor, placement, transport
        self.pages, self._timeout = pages, timeout
        group = executor.config.heads // executor.config.kv_heads
        self._tile = max(1, 16 // group)

    def run(self, step: Step) -> Result:
        """Computes a step with the other ranks, who run the same one.

        Raises:
            TransportError: another rank is gone, silent, or out of step.
        """
        rank, config = self._transport.rank, self._executor.config
        plan = StepPlan(self._placement, step.spans, rank, self._tile, config.sliding_window)
        rows = [*plan.short, *plan.long]
        token_ids = [_tokens(step, one) for one in rows]
        shard = ShardStep(self._executor, ShardCache(self.pages.pool, self._own(step.tables)), rows, token_ids)
        attention = _Attention(
            plan, shard, self._transport, config.heads * config.head_dim, config.heads, self._timeout
        )
        bad_layer = -1
        for layer in range(config.layers):
            attention.run()
            if step.diagnose and bad_layer < 0 and not shard.is_finite():
                bad_layer = layer
        wanted = [(one.span, one.positions.end - one.wanted, one.wanted) for one in rows if one.wanted]
        computed = shard.computed()
        return Result(wanted, computed.logits.numpy(), computed.states.numpy(), bad_layer, attention.sent)

    def _own(self, tables: NDArray[np.int32]) -> NDArray[np.int32]:
        """The pages that are here, 0 in place of the others."""
        ranks = [self._placement.rank_of_page(index) for index in range(tables.shape[1])]
        return np.where(np.array(ranks) == self._transport.rank, tables, 0).astype(np.int32)


def _tokens(step: Step, rows: Rows) -> Sequence[int]:
    base = step.spans[rows.span].base
    return step.token_ids[rows.span][rows.positions.first - base : rows.positions.end - base]


def _bytes(sends: Sequence[Send]) -> int:
    return sum(send.tensor.nbytes for send in sends)


class _Attention:
    """The attention of one step over all ranks; ``run`` is one layer of it."""

    def __init__(
        self, plan: StepPlan, shard: ShardStep, transport: Transport, width: int, heads: int, timeout: float
    ) -> None:
        self._plan, self._shard, self._transport, self._timeout = plan, shard, transport, timeout
        self._width, self._heads = width, heads
        self.sent = Sent()
        rank, self._size = transport.rank, transport.size
        self._ranks = range(self._size)
        self._short = [plan.short_task(holder) for holder in self._ranks]
        self._short_positions = _positions(plan.short)
        # Of whose rows, over these keys; and of our rows, over whose keys.
        self._for = [plan.long_task(owner, rank) for owner in self._ranks]
        self._from = [plan.long_task(rank, holder) for holder in self._ranks]
        self._positions = [_positions(plan.rows_of(owner)) for owner in self._ranks]
        sizes = [task.partials for task in (*self._short, *self._from)]
        bases = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        short, long = plan.folds(plan.short, bases[: self._size]), plan.folds(plan.long, bases[self._size :])
        self._fold = _Fold(
            np.concatenate([short[0], long[0]]), np.concatenate([short[1], short[1][-1] + long[1][1:]]).astype(np.int32)
        )

    def run(self) -> None:
        """One layer.

        Exchange 1 passes the queries of long rows on to the next rank. Exchange s + 1 also returns to their owner the
        partials that were computed meanwhile, for rows from s ranks before; the second one carries those of short rows.
        """
        plan, rank, size = self._plan, self._transport.rank, self._size
        queries = self._shard.queries()
        short, held = queries[: plan.short_count], queries[plan.short_count :].contiguous()
        shorts: dict[int, Partials] = {}
        longs: dict[int, Partials] = {}
        done: Partials | None = None
        for turn in range(size + 1 if plan.rings else 2):
            owner, next_owner = (rank - turn) % size, (rank - turn - 1) % size
            sends, receives = self._returns(turn, done, shorts.get(rank))
            self.sent += Sent(back=_bytes(sends))
            passes = plan.rings and turn < size - 1
            if passes and len(held):
                sends.append(Send((rank + 1) % size, held))
                self.sent += Sent(forward=held.nbytes)
            if passes and (coming := plan.count_of(next_owner)):
                receives.append(Receive((rank - 1) % size, (coming, self._width), torch.float32))
            pending = self._transport.start(sends, receives, self._timeout)
            if plan.rings and turn < size:
                done = self._shard.attend(self._for[owner], held, self._positions[owner])
            if turn == 0:
                shorts[rank] = self._shard.attend(self._short[rank], short, self._short_positions)
                longs[rank] = done or Partials.empty(0, self._heads, self._width // self._heads)
            came = iter(pending.wait())
            self._take(turn, came, shorts, longs)
            if passes:
                held = next(came, torch.empty(0, self._width))
        partials = [*(shorts[r] for r in self._ranks), *(longs[r] for r in self._ranks if r in longs)]
        outs, weights = (torch.cat([getattr(one, name) for one in partials]) for name in ("outs", "weights"))
        self._shard.fold(Partials(outs, weights), self._fold.parts, self._fold.offsets)

    def _returns(self, turn: int, done: Partials | None, short: Partials | None) -> tuple[list[Send], list[Receive]]:
        """What goes home in this turn, and what comes home."""
        rank, size = self._transport.rank, self._size
        sends: list[Send] = []
        receives: list[Receive] = []
        if turn == 1 and short is not None:
            for peer in self._ranks:
                if peer != rank:
                    sends += self._sent(peer, short)
                    receives += self._due(peer, self._short[peer])
        if turn > 1 and done is not None:
            # Computed in the turn before, for the rows of the rank that is so many places back.
            sends += self._sent((rank - turn + 1) % size, done)
            holder = (rank + turn - 1) % size
            receives += self._due(holder, self._from[holder])
        return sends, receives

    def _take(self, turn: int, came: Iterator[Tensor], shorts: dict[int, Partials], longs: dict[int, Partials]) -> None:
        """The partials that came in this turn, in the order in which they were asked for."""
        rank, size = self._transport.rank, self._size
        if turn == 1:
            for peer in self._ranks:
                if peer != rank:
                    shorts[peer] = self._received(self._short[peer], came)
        if turn > 1:
            holder = (rank + turn - 1) % size
            longs[holder] = self._received(self._from[holder], came)

    def _sent(self, peer: int, partials: Partials) -> list[Send]:
        return [Send(peer, partials.outs), Send(peer, partials.weights)] if len(partials.outs) else []

    def _due(self, peer: int, task: Task) -> list[Receive]:
        if not task.partials:
            return []
        shapes = ((task.partials, self._width), (task.partials, 2 * self._heads))
        return [Receive(peer, shape, torch.float32) for shape in shapes]

    def _received(self, task: Task, came: Iterator[Tensor]) -> Partials:
        if not task.partials:
            return Partials.empty(0, self._heads, self._width // self._heads)
        return Partials(next(came), next(came))


def _positions(rows: Sequence[Rows]) -> Ints:
    runs: list[Run] = [one.positions for one in rows]
    return np.concatenate([np.arange(run.first, run.end, dtype=np.int32) for run in runs] or [np.zeros(0, np.int32)])
