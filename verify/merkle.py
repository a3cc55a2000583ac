"""The Merkle tree of RFC 9162 (section 2.1; the tree of RFC 6962), over SHA-256.

    leaf    H(0x00 || entry)
    node    H(0x01 || left || right)
    root    of no leaves H(""), of one leaf the leaf, else node(root of the first k, root of the rest), k the largest
            power of two below n

Works on leaf hashes, so that whoever has the entries decides what goes into a leaf. Pairing each level from the left
and lifting an odd last node unchanged gives the same tree as the definition, without recursion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

HASH_SIZE = 32
LEAF_PREFIX = b"\x00"
NODE_PREFIX = b"\x01"

MAX_PATH = 64
"""Longest path that a proof may have: trees hold fewer than 2^64 leaves."""


def leaf_hash(entry: bytes) -> bytes:
    """The 32-byte hash of one entry."""
    return hashlib.sha256(LEAF_PREFIX + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The 32-byte hash of two children."""
    return hashlib.sha256(NODE_PREFIX + left + right).digest()


def root(leaves: Sequence[bytes]) -> bytes:
    """The root over leaf hashes of 32 bytes each."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    level = list(leaves)
    while len(level) > 1:
        level = _parents(level)
    return level[0]


def inclusion_path(leaves: Sequence[bytes], index: int) -> list[bytes]:
    """The siblings from leaf ``index`` up to the root, lowest first (RFC 9162 section 2.1.3.1).

    Raises:
        IndexError: there is no such leaf.
    """
    if not 0 <= index < len(leaves):
        raise IndexError(f"leaf {index} of {len(leaves)}")
    path: list[bytes] = []
    level = list(leaves)
    while len(level) > 1:
        sibling = index ^ 1
        if sibling < len(level):
            path.append(level[sibling])
        level = _parents(level)
        index //= 2
    return path


def verify_inclusion(leaf: bytes, index: int, size: int, path: Sequence[bytes], expected_root: bytes) -> bool:
    """Whether ``leaf`` is leaf ``index`` of the tree of ``size`` leaves with that root (RFC 9162 section 2.1.3.2).

    False for anything that does not fit: an index out of range, a path too short, too long or with odd-sized hashes.
    """
    if not 0 <= index < size or len(path) > MAX_PATH or any(len(part) != HASH_SIZE for part in (leaf, *path)):
        return False
    node, position, last = leaf, index, size - 1
    for sibling in path:
        if last == 0:
            return False
        if position % 2 == 1 or position == last:
            node = node_hash(sibling, node)
            while position % 2 == 0 and position != 0:
                position, last = position >> 1, last >> 1
        else:
            node = node_hash(node, sibling)
        position, last = position >> 1, last >> 1
    return last == 0 and node == expected_root


def _parents(level: list[bytes]) -> list[bytes]:
    paired = [node_hash(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
    return paired if len(level) % 2 == 0 else [*paired, level[-1]]
