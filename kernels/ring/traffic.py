"""The bytes that a rank sends, by formula; the tests hold what is measured against them.

Where every rank has keys that every row sees (decode, or a prefill on a long cached prefix), T rows, S slots, W ranks,
equal shares, e bytes an element:

    Ring        2 (W - 1) / W S Hkv D e
    TokenRing   (W - 1) / W T Hq D e forward, (W - 1) / W T Hq (4 D + 4) back
    gather-Q    the same, in 2 exchanges; (W - 1) T Hq (4 D + 4) in one where every rank has the rows

Causal zigzag needs three quarters of that. The functions are exact for shares that are not equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from countersign.kernels.merge import nodes_of
from countersign.kernels.ring.partition import Ranges


@dataclass(frozen=True, slots=True)
class Shape:
    """``element``: bytes of one element of queries, keys and values."""

    heads: int
    kv_heads: int
    head_dim: int
    element: int

    @property
    def query(self) -> int:
        """Bytes of a row's query."""
        return self.heads * self.head_dim * self.element

    @property
    def key_value(self) -> int:
        """Bytes of a slot's key and value."""
        return 2 * self.kv_heads * self.head_dim * self.element

    @property
    def partial(self) -> int:
        """Bytes of a row's (out, lse), in fp32."""
        return self.heads * (4 * self.head_dim + 4)


def token_ring(rows: Sequence[int], rank: int, shape: Shape) -> tuple[int, int]:
    """(forward, back) for ``rows[rank]`` rows a rank: it passes on all queries but those of the rank it passes them to,
    and answers all but itself.
    """
    total = sum(rows)
    return (total - rows[rank - 1]) * shape.query, (total - rows[rank]) * shape.partial


def pass_kv(slots: Sequence[int], rank: int, shape: Shape) -> int:
    """For ``slots[rank]`` keys a rank."""
    return (sum(slots) - slots[rank - 1]) * shape.key_value


def gather_q(rows: Sequence[int], rank: int, shape: Shape) -> tuple[int, int]:
    """(queries, partials) for ``rows[rank]`` rows a rank."""
    return (len(rows) - 1) * rows[rank] * shape.query, (sum(rows) - rows[rank]) * shape.partial


def replicated(rows: int, size: int, shape: Shape) -> int:
    """For ``rows`` rows that every rank has."""
    return (size - 1) * rows * shape.partial


def zigzag_token_ring(held: Sequence[Ranges], rank: int, shape: Shape, leaf: int | None = None) -> tuple[int, int]:
    """(forward, back) of a causal prefill without a prefix, cut by zigzag into chunks none of which is empty. A rank
    before the owner wants all its rows, one after it only those of its back chunk; with ``leaf`` the answer is a
    partial for each node: of the front chunk to the rows of a later rank, of both to the back rows of an earlier one.
    """
    size, ahead = len(held), (rank - 1) % len(held)
    forward = sum(_wanted(held, owner, ahead) for owner in range(size) if owner != ahead)
    back = 0
    for owner in range(size):
        if owner != rank:
            chunks = held[rank][:1] if rank < owner else held[rank]
            back += _wanted(held, owner, rank) * (_nodes(chunks, held, leaf) if leaf else 1)
    return forward * shape.query, back * shape.partial


def zigzag_pass_kv(held: Sequence[Ranges], rank: int, shape: Shape) -> int:
    """The same for Ring: a rank before the holder wants all its keys, one after it only those of its front chunk."""
    ahead = (rank - 1) % len(held)
    slots = (
        sum(map(len, mine)) if ahead < holder else len(mine[0]) for holder, mine in enumerate(held) if holder != ahead
    )
    return sum(slots) * shape.key_value


def _wanted(held: Sequence[Ranges], owner: int, holder: int) -> int:
    """The rows of ``owner`` that ``holder``'s keys matter to."""
    return sum(map(len, held[owner])) if holder < owner else len(held[owner][-1])


def _nodes(chunks: Ranges, held: Sequence[Ranges], leaf: int) -> int:
    leaves = -(-max(mine[-1].end for mine in held) // leaf)
    return sum(len(nodes_of(part.first // leaf, -(-part.end // leaf), leaves)) for part in chunks)
