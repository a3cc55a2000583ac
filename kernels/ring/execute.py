"""A plan carried out: one rank's part of an attention over all ranks.

    for each step: post its exchange; compute meanwhile; wait
    merge what came home

Partials are merged in the order of the canonical tree, or by rank in fast mode, never in the order they came.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from countersign.kernels.merge import fold, merge
from countersign.kernels.ring.layout import Part, Piece, count
from countersign.kernels.ring.local import Local, Partial
from countersign.kernels.ring.schedule import KeysValues, Message, Partials, Payload, Program, Queries
from countersign.kernels.ring.table import Table
from countersign.kernels.ring.transport import Receive, Send, Transport


def attend_over_ranks(
    program: Program, q: Tensor, k: Tensor, v: Tensor, transport: Transport, local: Local, *, timeout: float
) -> Partial:
    """Out (N, Hq, D) and lse (N, Hq), fp32 (fp64 for fp64), for the rows of ``program.rows``.

    Args:
        program: this rank's plan.
        q: (N, Hq, D), the rows of ``program.rows``.
        k: (M, Hkv, D), the slots of ``program.slots``; new tokens' keys included, after rotation.
        v: as k.
        transport: to the other ranks, which must run their programs of the same layout.
        local: computes pieces here.
        timeout: seconds that each exchange may take.

    Raises:
        LayoutError: q, k or v have other rows than the program says.
        TransportError: see :class:`~countersign.kernels.ring.transport.Pending`.
    """
    own = Tables(Table(program.rows, q), Table(program.slots, k), Table(program.slots, v))
    now, computed, home = own, dict[Piece, Partial](), dict[Piece, Partial]()
    wanted = {piece for pieces in program.home for piece in pieces}
    for step in program.steps:
        sends = [Send(to.peer, tensor) for to in step.sends for tensor in _tensors(to.payload, now, computed)]
        receives = [one for message in step.receives for one in _receives(message, own)]
        pending = transport.start(sends, receives, timeout)
        partials = local(step.compute, now.queries, now.keys, now.values) if step.compute else []
        computed = dict(zip(step.compute, partials, strict=True))
        home.update((piece, partial) for piece, partial in computed.items() if piece in wanted)
        now = _take_in(step.receives, pending.wait(), own, home)
    return _merged(program, home, q)


@dataclass(frozen=True, slots=True)
class Tables:
    """What a step may use: the rank's own, and what the last exchange brought."""

    queries: Table
    keys: Table
    values: Table


def _tensors(payload: Payload, now: Tables, computed: Mapping[Piece, Partial]) -> list[Tensor]:
    match payload:
        case Queries(rows):
            return [now.queries.take(rows)]
        case KeysValues(slots):
            return [now.keys.take(slots), now.values.take(slots)]
        case Partials(pieces):
            parts = [computed[piece] for piece in pieces]
            return [torch.cat([torch.cat((out, lse.unsqueeze(-1)), dim=-1) for out, lse in parts])]


def _receives(message: Message, own: Tables) -> list[Receive]:
    match message.payload:
        case Queries(rows):
            tables, length = [own.queries], count(rows)
        case KeysValues(slots):
            tables, length = [own.keys, own.values], count(slots)
        case Partials(pieces):
            heads, dim = own.queries.shape
            wide = torch.promote_types(own.queries.dtype, torch.float32)
            return [Receive(message.peer, (count(piece.rows for piece in pieces), heads, dim + 1), wide)]
    return [Receive(message.peer, (length, *table.shape), table.dtype) for table in tables]


def _take_in(messages: Sequence[Message], arrived: list[Tensor], own: Tables, home: dict[Piece, Partial]) -> Tables:
    """Partials go ``home``; the rest, with what is the rank's own, is there for the next step."""
    now, tensors = own, iter(arrived)
    for message in messages:
        match message.payload:
            case Queries(rows):
                now = replace(now, queries=now.queries.and_also(rows, next(tensors)))
            case KeysValues(slots):
                keys = now.keys.and_also(slots, next(tensors))
                now = replace(now, keys=keys, values=now.values.and_also(slots, next(tensors)))
            case Partials(pieces):
                parts = torch.split(next(tensors), [len(piece.rows) for piece in pieces])
                home.update((piece, (part[..., :-1], part[..., -1])) for piece, part in zip(pieces, parts, strict=True))
    return now


def _merged(program: Program, home: Mapping[Piece, Partial], q: Tensor) -> Partial:
    """The rank's rows, merged over the tree or, in fast mode, in the order of ranks."""
    found = [_empty(0, q)]
    for rows in program.rows:
        mine = [piece for pieces in program.home for piece in pieces if _inside(piece.rows, rows)]
        padded = [_padded(home[piece], piece.rows, rows) for piece in mine] or [_empty(len(rows), q)]
        if program.leaves and mine:
            found.append(fold({piece.node: partial for piece, partial in zip(mine, padded, strict=True) if piece.node}))
        else:
            found.append(merge(*(torch.stack(parts) for parts in zip(*padded, strict=True))))
    return torch.cat([out for out, _ in found]), torch.cat([lse for _, lse in found])


def _inside(inner: Part, outer: Part) -> bool:
    return inner.sequence == outer.sequence and outer.first <= inner.first and inner.end <= outer.end


def _padded(partial: Partial, of: Part, to: Part) -> Partial:
    """The partial of more rows, those outside it being empty."""
    (out, lse), before, after = partial, of.first - to.first, to.end - of.end
    if not before and not after:
        return partial
    return F.pad(out, (0, 0, 0, 0, before, after)), F.pad(lse, (0, 0, before, after), value=-torch.inf)


def _empty(rows: int, q: Tensor) -> Partial:
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_zeros((rows, *q.shape[1:]), dtype=wide), q.new_full((rows, q.shape[1]), -torch.inf, dtype=wide)
