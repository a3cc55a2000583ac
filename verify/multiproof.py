"""One proof that many leaves are in a Merkle tree of RFC 9162, for runs of consecutive leaves.

The tree is walked from the root along its own shape, which its size gives. A subtree without an opened leaf is one hash
of the proof, one whose leaves are all opened is computed, any other is split. So the proof is the list of those hashes
from left to right: nothing in it may be chosen, and it is as short as can be.

Runs are half-open ranges (start, stop), rising and apart. What is visited is at most the opened leaves and two paths a
run, whatever size a stranger claims.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeAlias

from countersign.verify import merkle
from countersign.verify.errors import Malformed, OpeningMismatch

Run: TypeAlias = tuple[int, int]

MAX_SIZE = 2**32


def hashes(leaves: Sequence[bytes], runs: Sequence[Run]) -> list[bytes]:
    """The proof that opens the leaves of ``runs``.

    Raises:
        Malformed: the runs do not fit the leaves.
    """
    shape = _shape(len(leaves), runs)
    return [merkle.root(leaves[start:stop]) for start, stop, opened in shape if not opened]


def root(size: int, runs: Sequence[Run], opened: Sequence[bytes], proof: Sequence[bytes]) -> bytes:
    """The root of the tree of ``size`` leaves in which ``opened`` are the leaves of the runs, one after another.

    Raises:
        Malformed: the runs do not fit the size, or the opened leaves do not fit the runs.
        OpeningMismatch: the proof has more or fewer hashes than this tree needs.
    """
    shape = list(_shape(size, runs))
    if len(opened) != total(runs):
        raise Malformed("the opened leaves are not as many as the runs hold", opened=len(opened))
    needed = sum(not known for *_, known in shape)
    if len(proof) != needed or any(len(part) != merkle.HASH_SIZE for part in proof):
        raise OpeningMismatch("the proof is not of a tree of this size", needed=needed, hashes=len(proof))
    nodes: dict[Run, bytes] = {}
    leaves, given = iter(opened), iter(proof)
    for start, stop, known in shape:
        nodes[start, stop] = merkle.root([next(leaves) for _ in range(start, stop)]) if known else next(given)
    return _joined(0, size, nodes)


def union(runs: Iterable[Run]) -> list[Run]:
    """The same leaves as rising runs that are apart."""
    merged: list[Run] = []
    for start, stop in sorted(runs):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return merged


def total(runs: Iterable[Run]) -> int:
    """How many leaves the runs hold."""
    return sum(stop - start for start, stop in runs)


def _shape(size: int, runs: Sequence[Run]) -> Iterator[tuple[int, int, bool]]:
    """The subtrees of the proof from left to right: (first leaf, end, whether its leaves are opened)."""
    bounds = [bound for run in runs for bound in run]
    if not 0 <= size <= MAX_SIZE or any(start >= stop for start, stop in runs) or bounds != sorted(set(bounds)):
        raise Malformed("the opened runs are not rising and apart", size=size)
    if bounds and not 0 <= bounds[0] < bounds[-1] <= size:
        raise Malformed("the opened runs reach outside the tree", size=size)
    if size:
        yield from _cut(0, size, bounds)


def _cut(start: int, stop: int, bounds: Sequence[int]) -> Iterator[tuple[int, int, bool]]:
    # An odd number of bounds at or before a leaf: it lies in a run.
    before, until = bisect_right(bounds, start), bisect_right(bounds, stop - 1)
    if before == until:
        yield start, stop, before % 2 == 1
        return
    middle = start + merkle.split(stop - start)
    yield from _cut(start, middle, bounds)
    yield from _cut(middle, stop, bounds)


def _joined(start: int, stop: int, nodes: dict[Run, bytes]) -> bytes:
    if stop == start:
        return merkle.root([])
    node = nodes.get((start, stop))
    if node is not None:
        return node
    middle = start + merkle.split(stop - start)
    return merkle.node_hash(_joined(start, middle, nodes), _joined(middle, stop, nodes))
