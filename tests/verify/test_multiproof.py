from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import merkle, multiproof
from countersign.verify.errors import Malformed, OpeningMismatch, VerificationError


def leaves_of(size: int) -> list[bytes]:
    return [merkle.leaf_hash(str(i).encode()) for i in range(size)]


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[bytes], list[multiproof.Run]]:
    size = draw(st.integers(1, 70))
    picked = draw(st.sets(st.integers(0, size - 1)))
    return leaves_of(size), multiproof.union((i, i + 1) for i in picked)


def opened(leaves: list[bytes], runs: list[multiproof.Run]) -> list[bytes]:
    return [leaf for start, stop in runs for leaf in leaves[start:stop]]


@given(trees())
def test_opened_leaves_and_the_hashes_of_the_rest_give_the_root(tree: tuple[list[bytes], list[multiproof.Run]]) -> None:
    leaves, runs = tree
    proof = multiproof.hashes(leaves, runs)
    assert multiproof.root(len(leaves), runs, opened(leaves, runs), proof) == merkle.root(leaves)
    assert not set(proof) & set(opened(leaves, runs)), "an opened leaf is not proved once more"


@given(st.integers(1, 200), st.data())
def test_one_leaf_needs_the_hashes_of_its_inclusion_path(size: int, data: st.DataObject) -> None:
    leaves, index = leaves_of(size), data.draw(st.integers(0, size - 1))
    proof = multiproof.hashes(leaves, [(index, index + 1)])
    assert sorted(proof) == sorted(merkle.inclusion_path(leaves, index))


@given(trees(), st.data())
def test_another_leaf_hash_or_place_gives_another_root(
    tree: tuple[list[bytes], list[multiproof.Run]], data: st.DataObject
) -> None:
    leaves, runs = tree
    proof, found = multiproof.hashes(leaves, runs), opened(leaves, runs)
    target = data.draw(st.sampled_from([part for part in (found, proof) if part]))
    index = data.draw(st.integers(0, len(target) - 1))
    target[index] = merkle.leaf_hash(b"forged")
    assert multiproof.root(len(leaves), runs, found, proof) != merkle.root(leaves)


@given(trees(), st.integers(1, 80))
def test_a_proof_that_opens_the_last_leaf_is_good_for_one_size_only(
    tree: tuple[list[bytes], list[multiproof.Run]], size: int
) -> None:
    """As leaves hold their index, moving the last one to the end of a larger tree is another leaf."""
    leaves, runs = tree
    last = len(leaves) - 1
    runs = multiproof.union([*runs, (last, last + 1)])
    proof, found = multiproof.hashes(leaves, runs), opened(leaves, runs)
    moved = multiproof.union([*multiproof.union(runs[:-1]), (size - 1, size)])
    if size == len(leaves) or multiproof.total(moved) != len(found):
        return
    found[-1] = merkle.leaf_hash(str(size - 1).encode())
    try:
        assert multiproof.root(size, moved, found, proof) != merkle.root(leaves)
    except VerificationError:
        return


def test_a_proof_of_the_first_leaf_alone_does_not_tell_the_size() -> None:
    """Why a challenge always opens the last leaf."""
    leaves = leaves_of(34)
    proof = multiproof.hashes(leaves, [(0, 1)])
    assert multiproof.root(64, [(0, 1)], leaves[:1], proof) == merkle.root(leaves)


@pytest.mark.parametrize(
    "runs", [[(2, 1)], [(1, 1)], [(0, 2), (1, 3)], [(0, 2), (2, 3)], [(2, 3), (0, 1)], [(-1, 1)], [(7, 9)]]
)
def test_runs_that_do_not_fit_are_refused(runs: list[multiproof.Run]) -> None:
    with pytest.raises(Malformed):
        multiproof.root(8, runs, [b""] * 9, [])


def test_hashes_too_many_or_too_few_are_refused() -> None:
    leaves = leaves_of(9)
    proof = multiproof.hashes(leaves, [(3, 5)])
    for wrong in (proof[:-1], [*proof, proof[0]], [], [proof[0][:31], *proof[1:]]):
        with pytest.raises(OpeningMismatch):
            multiproof.root(9, [(3, 5)], leaves[3:5], wrong)


def test_leaves_too_many_or_too_few_are_malformed() -> None:
    leaves = leaves_of(9)
    proof = multiproof.hashes(leaves, [(3, 5)])
    for wrong in (leaves[3:4], leaves[3:6], []):
        with pytest.raises(Malformed, match="not as many"):
            multiproof.root(9, [(3, 5)], wrong, proof)


def test_a_claimed_size_of_four_billion_costs_one_path() -> None:
    shape = list(multiproof._shape(2**32, [(2**31 + 5, 2**31 + 6)]))
    assert len(shape) == 33
    with pytest.raises(OpeningMismatch):
        multiproof.root(2**32, [(5, 6)], [b"\0" * 32], [])
