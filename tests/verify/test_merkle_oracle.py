"""The same roots and proofs as pymerkle's, an implementation that shares nothing with ours."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pymerkle import InmemoryTree
from pymerkle.proof import ConsistencyProof

from countersign.verify import merkle

ENTRIES = st.lists(st.binary(max_size=40), min_size=1, max_size=600)


def tree_of(entries: list[bytes]) -> InmemoryTree:
    tree = InmemoryTree(algorithm="sha256")
    tree.append_entries(entries)
    return tree


def rfc_path(proof: ConsistencyProof, old: int) -> list[bytes]:
    """Pymerkle's proof in the RFC's form.

    It begins at the first new leaf where the RFC begins at the old tree's last perfect subtree, and always names that
    subtree, which the RFC leaves out where it is the whole old tree.
    """
    path, of_old = proof.path, proof.subset
    first = of_old.index(1)
    between = list(path[:1])
    for right in path[1:first]:
        between = [merkle.node_hash(between[0], right)]
    rest = [*(between if first else []), *path[first + 1 :]]
    return rest if old & (old - 1) == 0 else [path[first], *rest]


@given(ENTRIES, st.data())
def test_roots_and_inclusion_proofs_are_pymerkles(entries: list[bytes], data: st.DataObject) -> None:
    tree, leaves = tree_of(entries), [merkle.leaf_hash(entry) for entry in entries]
    size = data.draw(st.integers(1, len(entries)))
    index = data.draw(st.integers(0, size - 1))
    assert merkle.root(leaves[:size]) == tree.get_root(size)
    assert [leaves[index], *merkle.inclusion_path(leaves[:size], index)] == tree.prove_inclusion(index + 1, size).path


@given(ENTRIES.filter(lambda entries: len(entries) > 1), st.data())
def test_consistency_proofs_are_pymerkles(entries: list[bytes], data: st.DataObject) -> None:
    tree, leaves = tree_of(entries), [merkle.leaf_hash(entry) for entry in entries]
    new = data.draw(st.integers(2, len(entries)))
    old = data.draw(st.integers(1, new - 1))  # of a tree with itself the RFC's proof is empty, pymerkle's is not
    assert merkle.consistency_path(leaves[:new], old) == rfc_path(tree.prove_consistency(old, new), old)
