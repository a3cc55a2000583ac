from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given

from countersign.verify import cbor, merkle
from countersign.verify.equivocation import Equivocation, conflict_of
from countersign.verify.errors import BadSignature, Malformed, NotCheckable, Untrusted
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, cosign, sign
from countersign.verify.testing import signing_key

ORIGIN = "log.example/receipts"
KEY = NoteKey(ORIGIN, signing_key().public_key())


def leaves(*entries: object) -> list[bytes]:
    return [merkle.leaf_hash(str(entry).encode()) for entry in entries]


def note(tree: Sequence[bytes], size: int | None = None, extensions: tuple[str, ...] = ()) -> bytes:
    part = tree[: len(tree) if size is None else size]
    return sign(Checkpoint(ORIGIN, len(part), merkle.root(part), extensions), signing_key())


def steps_between(tree: Sequence[bytes], old: int) -> list[bytes]:
    """The hashes of the tree by which both roots follow (``merkle.consistency_roots``)."""
    path = merkle.consistency_path(tree, old)
    return path if old & (old - 1) else [merkle.root(tree[:old]), *path]


def checkpoint(tree: Sequence[bytes]) -> Checkpoint:
    return Checkpoint(ORIGIN, len(tree), merkle.root(tree))


@given(old=st.integers(1, 40), more=st.integers(1, 40), fork=st.integers(0, 39))
def test_any_rewritten_entry_is_proven_by_the_later_trees_own_hashes(old: int, more: int, fork: int) -> None:
    first = leaves(*range(old))
    later = leaves(*(f"other {index}" if index == fork % old else index for index in range(old + more)))
    found = conflict_of(checkpoint(first), checkpoint(later), steps_between(later, old))
    assert found is not None
    assert str(old) in found


@given(
    size=st.integers(1, 40),
    old=st.integers(0, 40),
    steps=st.lists(st.sampled_from(leaves(*range(12))) | st.binary(max_size=33), max_size=9),
)
def test_no_hashes_accuse_a_log_that_only_grew(size: int, old: int, steps: list[bytes]) -> None:
    tree = leaves(*range(size))
    old = min(old, size)
    assert conflict_of(checkpoint(tree[:old]), checkpoint(tree), steps) is None
    if 0 < old < size:
        assert conflict_of(checkpoint(tree[:old]), checkpoint(tree), steps_between(tree, old)) is None


@pytest.mark.parametrize(("old", "size"), [(1, 2), (3, 5), (4, 7), (6, 8), (8, 40)])
def test_hashes_of_no_tree_accuse_nobody_though_they_are_as_many_as_it_takes(old: int, size: int) -> None:
    """Of a power of two the first one is the old root, of all others any will do: both roots follow, neither signed."""
    tree = leaves(*range(size))
    made_up = leaves(*(f"made up {place}" for place in range(len(steps_between(tree, old)))))
    assert merkle.consistency_roots(old, size, made_up) is not None
    assert conflict_of(checkpoint(tree[:old]), checkpoint(tree), made_up) is None
    assert conflict_of(checkpoint(tree[:old]), checkpoint(tree), [merkle.root(tree[:old]), *made_up[1:]]) is None


def test_two_logs_that_differ_accuse_neither_nor_does_a_witness_in_a_logs_place() -> None:
    other = NoteKey("other.example", signing_key(2).public_key())
    foreign = sign(Checkpoint(other.name, 3, b"f" * 32), signing_key(2))
    with pytest.raises(Malformed, match="two logs"):
        Equivocation(note(leaves(1, 2, 3)), foreign).verify([KEY, other])
    witness = NoteKey("witness.example", signing_key(3).public_key(), KeyKind.WITNESS)
    pair = [cosign(note(leaves(*last)), signing_key(3), witness.name, time=1) for last in ((1, 2), (1, 3))]
    assert Equivocation(pair[0], pair[1]).verify([KEY, witness])
    with pytest.raises(Untrusted):
        Equivocation(pair[0], pair[1]).verify([witness])


def test_two_roots_or_two_texts_of_one_size_are_evidence_by_themselves() -> None:
    tree = leaves(1, 2, 3)
    others = Equivocation(note(tree), note(leaves(1, 2, 4)))
    assert others.verify([KEY]) == "two roots are signed for 3 entries"
    draws = Equivocation(note(tree), note(tree, extensions=("countersign-share 0.0",)))
    assert "draw" in draws.verify([KEY])
    with pytest.raises(NotCheckable, match="fit"):
        Equivocation(note(tree), note(tree)).verify([KEY])


def test_a_log_that_draws_nothing_may_write_what_it_likes_below_its_root() -> None:
    """Some logs write the time there, and sign one size again and again."""
    tree = leaves(1, 2, 3)
    again = Equivocation(note(tree, extensions=("Timestamp: 1",)), note(tree, extensions=("Timestamp: 2",)))
    with pytest.raises(NotCheckable, match="fit"):
        again.verify([KEY])
    shares = [note(tree, extensions=(f"countersign-share {share}",)) for share in ("0.1", "0.2")]
    assert "draw" in Equivocation(shares[0], shares[1]).verify([KEY])


def test_evidence_needs_the_logs_own_signatures() -> None:
    tree, forged = leaves(1, 2, 3), Checkpoint(ORIGIN, 3, b"f" * 32)
    stranger = sign(forged, signing_key(2))
    with pytest.raises(Untrusted):
        Equivocation(note(tree), stranger).verify([KEY])
    changed = note(tree).replace(b"\n3\n", b"\n4\n")
    with pytest.raises(BadSignature):
        Equivocation(note(tree), changed).verify([KEY])
    with pytest.raises(Malformed, match="wrong order"):
        Equivocation(note(tree), note(tree, 2)).verify([KEY])


def test_evidence_reads_back_and_has_one_name_whoever_found_it() -> None:
    later = leaves("x", 1, 2, 3, 4)
    found = Equivocation(note(leaves(0, 1, 2)), note(later), tuple(steps_between(later, 3)))
    again = Equivocation.from_cbor(cbor.loads(cbor.dumps(found.to_cbor())))
    assert again == found
    assert again.verify([KEY]).startswith("the tree over 5 entries")
    assert Equivocation(found.earlier, found.later).digest() == found.digest()
    assert Equivocation(found.earlier, found.earlier).digest() != found.digest()


@pytest.mark.parametrize(
    "value",
    [
        None,
        {"version": 2, "earlier": b"", "later": b"", "steps": []},
        {"version": 1, "earlier": b"", "later": b"", "steps": [b"short"]},
        {"version": 1, "earlier": b"", "later": b"", "steps": [b"x" * 32] * 65},
        {"version": 1, "earlier": b"", "later": b"", "steps": [], "more": 1},
    ],
)
def test_what_is_no_evidence_is_malformed(value: object) -> None:
    with pytest.raises(Malformed):
        Equivocation.from_cbor(value)
