"""Who sends what when: pure plans, one batched exchange a step, sent while the step computes.

In step s of TokenRing rank r computes for the rows of rank r + s: queries go from r to r - 1, and the partials of step
s go straight home in step s + 1 (arXiv 2412.20501, algorithm 1). Ring (pass-KV) moves keys and values the same way
and no partials. All-gather-Q sends queries to all at once and partials home at once: 2 exchanges for W - 1, and 1 where
every rank has the rows already. Only rows and keys that can matter to a rank yet to come travel: in zigzag,
three quarters.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from countersign.kernels.ring.errors import LayoutError
from countersign.kernels.ring.layout import Layout, Parts, Piece

SHORT = 128
"""Up to so many rows a sequence, the latency of W - 1 exchanges weighs more than what overlapping them saves."""


@dataclass(frozen=True, slots=True)
class Queries:
    rows: Parts


@dataclass(frozen=True, slots=True)
class KeysValues:
    slots: Parts


@dataclass(frozen=True, slots=True)
class Partials:
    """In fp32: out (rows, heads, head_dim) and lse (rows, heads), side by side."""

    pieces: tuple[Piece, ...]


Payload = Queries | KeysValues | Partials


@dataclass(frozen=True, slots=True)
class Message:
    peer: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Step:
    """``sends`` are of what was there before the step: own rows and keys, those received last, and the partials of
    the last step. ``compute`` may use the same.
    """

    sends: tuple[Message, ...] = ()
    receives: tuple[Message, ...] = ()
    compute: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """What a rank has (``rows``, ``slots``), does (``steps``) and merges (``home``: its rows' pieces, by holder).

    Pure, so one program serves all layers of a forward pass.
    """

    rows: Parts
    slots: Parts
    steps: tuple[Step, ...]
    home: tuple[tuple[Piece, ...], ...]
    leaves: bool
    """Whether pieces are nodes of the canonical tree."""


class Schedule(Enum):
    TOKEN_RING = "token-ring"  # noqa: S105  no password
    PASS_KV = "pass-kv"  # noqa: S105
    GATHER_Q = "gather-q"


def choose(new: int, cached: int, heads: int, kv_heads: int) -> Schedule:
    """The schedule that moves least for ``new`` rows after ``cached`` tokens: few rows, all-gather-Q; else TokenRing
    where its queries and outs are less than the keys and values: new * heads < 2 (cached + new) kv_heads.
    """
    if new <= SHORT:
        return Schedule.GATHER_Q
    return Schedule.TOKEN_RING if new * heads < 2 * (cached + new) * kv_heads else Schedule.PASS_KV


def plan(schedule: Schedule, layout: Layout, rank: int) -> Program:
    """What ``rank`` does.

    Raises:
        LayoutError: a ring is to move rows that every rank has.
    """
    if schedule is Schedule.GATHER_Q:
        steps = _replicated(layout, rank) if layout.rows is None else _gather_q(layout, rank)
    elif layout.rows is None:
        raise LayoutError(f"{schedule.value} moves what one rank has to the others, but every rank has these rows")
    else:
        steps = _token_ring(layout, rank) if schedule is Schedule.TOKEN_RING else _pass_kv(layout, rank)
    home = tuple(layout.pieces(rank, holder) for holder in range(layout.size))
    return Program(layout.rows_of(rank), layout.slots_of(rank), steps, home, layout.leaf is not None)


def _token_ring(layout: Layout, rank: int) -> tuple[Step, ...]:
    size = layout.size
    steps = []
    for step in range(size + 1 if size > 1 else 1):
        ahead = (rank + step) % size
        sends, receives = [], []
        if step < size - 1:
            behind, nearer = (rank - 1) % size, (rank + 1) % size
            sends.append(Message(behind, Queries(_still_needed(layout, ahead, step))))
            receives.append(Message(nearer, Queries(_still_needed(layout, (nearer + step) % size, step))))
        if step > 1:
            owner, holder = (rank + step - 1) % size, (rank - step + 1) % size
            sends.append(Message(owner, Partials(layout.pieces(owner, rank))))
            receives.append(Message(holder, Partials(layout.pieces(rank, holder))))
        steps.append(_step(sends, receives, layout.pieces(ahead, rank) if step < size else ()))
    return tuple(steps)


def _still_needed(layout: Layout, owner: int, step: int) -> Parts:
    """The rows of ``owner`` that the ranks it comes to after ``step`` want."""
    return layout.rows_for(owner, [(owner - later) % layout.size for later in range(step + 1, layout.size)])


def _pass_kv(layout: Layout, rank: int) -> tuple[Step, ...]:
    size = layout.size
    steps = []
    for step in range(size):
        holder, sends, receives = (rank + step) % size, list[Message](), list[Message]()
        if step < size - 1:
            nearer = (rank + 1) % size
            for messages, peer, of in ((sends, (rank - 1) % size, holder), (receives, nearer, (nearer + step) % size)):
                owners = [(of - later) % size for later in range(step + 1, size)]
                messages.append(Message(peer, KeysValues(layout.slots_for(of, owners))))
        steps.append(_step(sends, receives, layout.pieces(rank, holder)))
    return tuple(steps)


def _gather_q(layout: Layout, rank: int) -> tuple[Step, ...]:
    peers = [peer for peer in range(layout.size) if peer != rank]
    asked = _step(
        [Message(peer, Queries(layout.rows_for(rank, [peer]))) for peer in peers],
        [Message(peer, Queries(layout.rows_for(peer, [rank]))) for peer in peers],
        layout.pieces(rank, rank),
    )
    answered = Step(compute=tuple(piece for peer in peers for piece in layout.pieces(peer, rank)))
    return (asked, answered, _home(layout, rank, peers)) if peers else (asked,)


def _replicated(layout: Layout, rank: int) -> tuple[Step, ...]:
    peers = [peer for peer in range(layout.size) if peer != rank]
    own = Step(compute=layout.pieces(rank, rank))
    return (own, _home(layout, rank, peers)) if peers else (own,)


def _home(layout: Layout, rank: int, peers: list[int]) -> Step:
    return _step(
        [Message(peer, Partials(layout.pieces(peer, rank))) for peer in peers],
        [Message(peer, Partials(layout.pieces(rank, peer))) for peer in peers],
    )


def _step(sends: list[Message], receives: list[Message], compute: tuple[Piece, ...] = ()) -> Step:
    """Without messages that would be empty; both ends leave out the same."""
    return Step(tuple(filter(_has_content, sends)), tuple(filter(_has_content, receives)), compute)


def _has_content(message: Message) -> bool:
    match message.payload:
        case Queries(parts) | KeysValues(parts) | Partials(parts):
            return bool(parts)
