from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import merkle

# The inputs and roots of the RFC 6962 reference implementation's own tests.
ENTRIES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]

LEAVES = st.lists(st.binary(max_size=8), min_size=1, max_size=70).map(lambda entries: [*map(merkle.leaf_hash, entries)])


def definition(leaves: list[bytes]) -> bytes:
    """MTH of RFC 9162 section 2.1.1, word for word."""
    if len(leaves) <= 1:
        return leaves[0] if leaves else hashlib.sha256(b"").digest()
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    return hashlib.sha256(b"\x01" + definition(leaves[:half]) + definition(leaves[half:])).digest()


@pytest.mark.parametrize(("size", "expected"), [*enumerate(ROOTS, 1)])
def test_the_published_vectors_give_the_published_roots(size: int, expected: str) -> None:
    assert merkle.root([merkle.leaf_hash(entry) for entry in ENTRIES[:size]]).hex() == expected


def test_the_empty_tree_has_the_hash_of_nothing() -> None:
    assert merkle.root([]) == hashlib.sha256(b"").digest()


@given(LEAVES)
def test_the_root_is_the_one_of_the_definition(leaves: list[bytes]) -> None:
    assert merkle.root(leaves) == definition(leaves)


@given(LEAVES, st.data())
def test_every_leaf_is_included_and_only_at_its_own_index(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    path, root = merkle.inclusion_path(leaves, index), merkle.root(leaves)
    assert merkle.verify_inclusion(leaves[index], index, len(leaves), path, root)
    for other in range(len(leaves)):
        if leaves[other] != leaves[index]:
            assert not merkle.verify_inclusion(leaves[index], other, len(leaves), path, root)


@given(LEAVES, st.data())
def test_a_proof_that_was_touched_anywhere_is_refused(leaves: list[bytes], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(leaves) - 1))
    path, root = merkle.inclusion_path(leaves, index), merkle.root(leaves)
    spoiled = [bytes([part[0] ^ 1]) + part[1:] for part in path]
    for step in range(len(path)):
        changed = [*path[:step], spoiled[step], *path[step + 1 :]]
        assert not merkle.verify_inclusion(leaves[index], index, len(leaves), changed, root)
    for wrong in ([*path, root], path[:-1] if path else [root], [root, *path], [part[:-1] for part in path] or [b""]):
        assert not merkle.verify_inclusion(leaves[index], index, len(leaves), wrong, root)


def test_a_leaf_outside_the_tree_has_no_path_and_no_proof() -> None:
    leaves = [merkle.leaf_hash(entry) for entry in ENTRIES]
    for index in (-1, 8):
        with pytest.raises(IndexError):
            merkle.inclusion_path(leaves, index)
        assert not merkle.verify_inclusion(leaves[0], index, 8, merkle.inclusion_path(leaves, 0), merkle.root(leaves))


def test_a_tree_cannot_be_claimed_to_be_smaller_than_it_is() -> None:
    """The path of the last leaf of two leads to the root from index 0 of a tree of one just as well."""
    leaves = [merkle.leaf_hash(entry) for entry in ENTRIES[:2]]
    root = merkle.root(leaves)
    assert merkle.verify_inclusion(leaves[1], 1, 2, [leaves[0]], root)
    assert not merkle.verify_inclusion(leaves[1], 0, 1, [leaves[0]], root)


def proof_of_definition(old: int, leaves: list[bytes], whole: bool = True) -> list[bytes]:
    """SUBPROOF of RFC 9162 section 2.1.4.1, word for word."""
    if old == len(leaves):
        return [] if whole else [definition(leaves)]
    half = 1 << ((len(leaves) - 1).bit_length() - 1)
    if old <= half:
        return [*proof_of_definition(old, leaves[:half], whole), definition(leaves[half:])]
    return [*proof_of_definition(old - half, leaves[half:], False), definition(leaves[:half])]


@given(LEAVES, st.data())
def test_a_consistency_proof_is_the_one_of_the_definition_and_holds(leaves: list[bytes], data: st.DataObject) -> None:
    old = data.draw(st.integers(1, len(leaves)))
    path = merkle.consistency_path(leaves, old)
    assert path == proof_of_definition(old, leaves)
    assert merkle.verify_consistency(old, len(leaves), merkle.root(leaves[:old]), merkle.root(leaves), path)


@given(LEAVES, st.data())
def test_a_log_that_rewrote_an_old_entry_has_no_consistency_proof(leaves: list[bytes], data: st.DataObject) -> None:
    old = data.draw(st.integers(1, len(leaves)))
    rewritten = data.draw(st.integers(0, old - 1))
    other = [*leaves[:rewritten], merkle.leaf_hash(b"something else, longer"), *leaves[rewritten + 1 :]]
    before, after = merkle.root(leaves[:old]), merkle.root(other)
    for path in (merkle.consistency_path(leaves, old), merkle.consistency_path(other, old)):
        assert not merkle.verify_consistency(old, len(leaves), before, after, path)


@given(LEAVES, st.data())
def test_a_touched_consistency_proof_is_refused(leaves: list[bytes], data: st.DataObject) -> None:
    old, new = data.draw(st.integers(1, len(leaves))), len(leaves)
    before, after, path = merkle.root(leaves[:old]), merkle.root(leaves), merkle.consistency_path(leaves, old)
    spoiled = [bytes([part[0] ^ 1]) + part[1:] for part in path]
    changed = [[*path[:step], spoiled[step], *path[step + 1 :]] for step in range(len(path))]
    wrong = [*changed, [*path, after], [after, *path], [*path, *([after] * merkle.MAX_PATH)], [b"short", *path[1:]]]
    for other in (*wrong, path[:-1] if path else [before]):
        assert not merkle.verify_consistency(old, new, before, after, other)
    if old < new:
        assert not merkle.verify_consistency(old, new, after, before, path)
        assert not merkle.verify_consistency(new, old, after, before, path)


def test_a_consistency_proof_that_ends_below_the_root_of_the_claimed_size_is_refused() -> None:
    leaves = [merkle.leaf_hash(entry) for entry in ENTRIES]
    before, after, path = merkle.root(leaves[:4]), merkle.root(leaves), merkle.consistency_path(leaves, 4)
    assert merkle.verify_consistency(4, 8, before, after, path)
    for claimed in (9, 16, 2**40):
        assert not merkle.verify_consistency(4, claimed, before, after, path)


def test_the_empty_tree_begins_every_tree_and_nothing_else_does() -> None:
    leaves = [merkle.leaf_hash(entry) for entry in ENTRIES]
    empty, full = merkle.root([]), merkle.root(leaves)
    assert merkle.consistency_path(leaves, 0) == []
    assert merkle.verify_consistency(0, 8, empty, full, [])
    assert merkle.verify_consistency(0, 0, empty, empty, [])
    assert not merkle.verify_consistency(0, 8, full, full, [])
    assert not merkle.verify_consistency(8, 8, empty, full, [])
    assert not merkle.verify_consistency(-1, 8, empty, full, [])
    for old in (-1, 9):
        with pytest.raises(IndexError):
            merkle.consistency_path(leaves, old)


@given(LEAVES)
def test_a_frontier_has_the_root_of_all_that_was_appended(leaves: list[bytes]) -> None:
    frontier = merkle.Frontier()
    assert frontier.root() == merkle.root([])
    for size, leaf in enumerate(leaves, 1):
        frontier.append(leaf)
        assert (frontier.size, frontier.root()) == (size, merkle.root(leaves[:size]))


def test_an_inner_node_does_not_pass_for_a_leaf() -> None:
    leaves = [merkle.leaf_hash(entry) for entry in ENTRIES[:2]]
    entry = leaves[0] + leaves[1]
    assert merkle.leaf_hash(entry) != merkle.root(leaves)
