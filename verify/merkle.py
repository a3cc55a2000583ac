"""The Merkle tree of RFC 9162 (section 2.1; the tree of RFC 6962), over SHA-256.

    leaf    H(0x00 || entry)
    node    H(0x01 || left || right)
    root    of no leaves H(""), of one leaf the leaf, else node(root of the first k, root of the rest), k the largest
            power of two below n

Works on leaf hashes, so that whoever has the entries decides what goes into a leaf. Pairing each level from the left
and lifting an odd last node unchanged gives the same tree as the definition, without recursion.

A proof is the roots of some ranges of leaves; ``inclusion_ranges`` and ``consistency_ranges`` say which. Whoever has
all leaves hashes them; a log that keeps tiles looks up the ``perfect`` subtrees that a range falls into.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

HASH_SIZE = 32
LEAF_PREFIX = b"\x00"
NODE_PREFIX = b"\x01"

MAX_PATH = 64
"""Longest path that a proof may have: trees hold fewer than 2^64 leaves."""

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """The 32-byte hash of one entry."""
    return hashlib.sha256(LEAF_PREFIX + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The 32-byte hash of two children."""
    return hashlib.sha256(NODE_PREFIX + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes of 32 bytes each."""
    if not leaves:
        return EMPTY_ROOT
    level = list(leaves)
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def fold(subtrees: Sequence[bytes]) -> bytes:
    """The root over the perfect subtrees of a range, largest first: ``root`` of a range from its ``perfect`` parts."""
    if not subtrees:
        return EMPTY_ROOT
    node = subtrees[-1]
    for left in reversed(subtrees[:-1]):
        node = node_hash(left, node)
    return node


def perfect(begin: int, end: int) -> list[tuple[int, int]]:
    """The perfect subtrees (height, index) whose leaves are ``begin`` to ``end`` - 1, largest first.

    ``begin`` must be a multiple of the largest power of two that fits into the range, as in all ranges of proofs.
    """
    parts = []
    for height in reversed(range((end - begin).bit_length())):
        if (end - begin) >> height & 1:
            parts.append((height, begin >> height))
            begin += 1 << height
    return parts


def inclusion_ranges(index: int, size: int) -> list[tuple[int, int]]:
    """The ranges of leaves [begin, end) whose roots prove leaf ``index`` in a tree of ``size``, lowest first.

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < size:
        raise IndexError(f"leaf {index} of {size}")
    return list(_siblings(index, index + 1, size))


def consistency_ranges(old: int, new: int) -> list[tuple[int, int]]:
    """The ranges whose roots prove that the first ``old`` leaves of a tree of ``new`` are the tree of ``old``, lowest
    first (RFC 9162 section 2.1.4.1). None where there is nothing to prove: ``old`` is 0 or ``new``.

    Raises:
        IndexError: ``old`` is larger than ``new``.
    """
    if not 0 <= old <= new:
        raise IndexError(f"a tree of {old} leaves is no beginning of one of {new}")
    if old in (0, new):
        return []
    begin = old & (old - 1)  # the last perfect subtree of the old tree is where the two paths begin
    own = [] if begin == 0 else [(begin, old)]
    return own + list(_siblings(begin, old, new))


def split(size: int) -> int:
    """How many of ``size`` (2 or more) leaves lie left of the root: the largest power of two below it."""
    return 1 << ((size - 1).bit_length() - 1)


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from leaf ``index`` up to the root, lowest first (RFC 9162 section 2.1.3.1).

    Raises:
        IndexError: there is no such leaf.
    """
    return [root(leaves[begin:end]) for begin, end in inclusion_ranges(index, len(leaves))]


def consistency_path(leaves: Sequence[bytes], old: int) -> list[bytes]:
    """The proof that the first ``old`` of these leaves are a tree of their own (RFC 9162 section 2.1.4.1).

    Raises:
        IndexError: there are fewer leaves.
    """
    return [root(leaves[begin:end]) for begin, end in consistency_ranges(old, len(leaves))]


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], expected_root: bytes) -> bool:
    """Whether ``leaf`` is leaf ``index`` of the tree of ``size`` leaves with that root (RFC 9162 section 2.1.3.2).

    False for anything that does not fit: an index out of range, a path too short, too long or with odd-sized hashes.
    """
    return root_of_inclusion(leaf, index, size, path) == expected_root


def root_of_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes]) -> bytes | None:
    """The root that an inclusion proof leads to; None if it cannot be one.

    Index and size are only as true as what says them: one root has proofs for several of them.
    """
    if not 0 <= index < size or len(path) > MAX_PATH or not _hashes([leaf, *path]):
        return None
    node, position, last = leaf, index, size - 1
    for sibling in path:
        if last == 0:
            return None
        if position % 2 == 1 or position == last:
            node = node_hash(sibling, node)
            while position % 2 == 0 and position != 0:
                position, last = position >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        position, last = position >> 1, last >> 1
    return node if last == 0 else None


def verify_consistency(old: int, new: int, old_root: bytes, new_root: bytes, path: Sequence[bytes]) -> bool:
    """Whether the tree of ``new`` leaves begins with the tree of ``old`` (RFC 9162 section 2.1.4.2).

    An empty tree is the beginning of every tree, and a tree of itself, both with an empty path. False for anything
    that does not fit.
    """
    if not 0 <= old <= new or len(path) > MAX_PATH or not _hashes([old_root, new_root, *path]):
        return False
    if old in (0, new):
        return not path and (old_root == new_root if old == new else old_root == EMPTY_ROOT)
    steps = list(path) if old & (old - 1) else [old_root, *path]
    return consistency_roots(old, new, steps) == (old_root, new_root)


def consistency_roots(old: int, new: int, steps: Sequence[bytes]) -> tuple[bytes, bytes] | None:
    """The roots over ``old`` and over ``new`` leaves that follow from the same hashes; None where these do not fit.

    Args:
        old: At least 1, less than ``new``.
        new: The larger size.
        steps: The consistency proof, but always with the last perfect subtree of the old tree in front, which a proof
            leaves out where it is the whole old tree.
    """
    if not 0 < old < new or not steps or not _hashes(steps):
        return None
    position, last = old - 1, new - 1
    while position % 2 == 1:
        position, last = position >> 1, last >> 1
    of_old = of_new = steps[0]
    for sibling in steps[1:]:
        if last == 0:
            return None
        if position % 2 == 1 or position == last:
            of_old, of_new = node_hash(sibling, of_old), node_hash(sibling, of_new)
            while position % 2 == 0 and position != 0:
                position, last = position >> 1, last >> 1
        else:
            of_new = node_hash(of_new, sibling)
        position, last = position >> 1, last >> 1
    return (of_old, of_new) if last == 0 else None


class Frontier:
    """A tree that grows at its right edge, kept as its perfect subtrees: log2(size) hashes (a compact range)."""

    def __init__(self) -> None:
        self.size = 0
        self._subtrees: list[bytes] = []  # largest first

    def append(self, leaf: bytes) -> None:
        """One more leaf hash."""
        size, node = self.size, leaf
        while size & 1:
            node = node_hash(self._subtrees.pop(), node)
            size >>= 1
        self._subtrees.append(node)
        self.size += 1

    def extend(self, leaves: Iterable[bytes]) -> None:
        for leaf in leaves:
            self.append(leaf)

    def root(self) -> bytes:
        """The root over all leaves so far."""
        return fold(self._subtrees)


def _siblings(begin: int, end: int, size: int) -> Iterator[tuple[int, int]]:
    """The siblings on the way from the perfect subtree over [begin, end) up to the root over ``size``, lowest first."""
    width, index = end - begin, begin // (end - begin)
    while width < size:
        sibling = (index ^ 1) * width
        if sibling < size:
            yield sibling, min(sibling + width, size)
        width, index = width * 2, index // 2


def _hashes(parts: Iterable[bytes]) -> bool:
    return all(len(part) == HASH_SIZE for part in parts)


def _parents(level: list[bytes]) -> list[bytes]:
    paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return paired if len(level) % 2 == 0 else [*paired, level[-1]]
