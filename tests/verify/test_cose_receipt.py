"""COSE Receipts (RFC 9942): proofs that stand alone, and what they must not be taken for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import cbor2
import pytest
from cwt import COSE, COSEKey
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import cbor, cose, cose_receipt, merkle
from countersign.verify.cose import key_id
from countersign.verify.errors import BadSignature, Inconsistent, Malformed, Untrusted, VerificationError
from countersign.verify.testing import signing_key

LOG = signing_key(7)
KEYS = [signing_key(8).public_key(), LOG.public_key()]
LEAVES = [merkle.leaf_hash(b"entry %d" % index) for index in range(300)]


def inclusion(index: int, size: int) -> bytes:
    leaves = LEAVES[:size]
    return cose_receipt.prove_inclusion(merkle.root(leaves), size, index, merkle.inclusion_path(leaves, index), LOG)


def consistency(old: int, new: int) -> bytes:
    leaves = LEAVES[:new]
    return cose_receipt.prove_consistency(merkle.root(leaves), old, new, merkle.consistency_path(leaves, old), LOG)


def changed(data: bytes, change: Callable[[list[Any]], object]) -> bytes:
    """The receipt changed as plain CBOR: [protected map, unprotected, payload, signature, proof]."""
    protected, unprotected, payload, signature = cbor2.loads(data).value
    ((label, (proof,)),) = unprotected[396].items()
    parts = [cbor2.loads(protected), {}, payload, signature, cbor2.loads(proof)]
    change(parts)
    unprotected = parts[1] or {396: {label: [cbor.dumps(parts[4])]}}
    return cbor.dumps(cbor2.CBORTag(18, [cbor.dumps(parts[0]), unprotected, parts[2], parts[3]]))


@given(st.data())
def test_a_receipt_of_inclusion_proves_its_leaf_and_no_other(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 300))
    index = data.draw(st.integers(0, size - 1))
    found = cose_receipt.verify_inclusion(inclusion(index, size), LEAVES[index], KEYS)
    assert (found.size, found.index, found.root) == (size, index, merkle.root(LEAVES[:size]))
    assert found.key_id == key_id(LOG.public_key())
    with pytest.raises(BadSignature):
        cose_receipt.verify_inclusion(inclusion(index, size), merkle.leaf_hash(b"another"), KEYS)


@given(st.data())
def test_a_receipt_of_consistency_proves_that_the_log_grew(data: st.DataObject) -> None:
    new = data.draw(st.integers(2, 300))
    old = data.draw(st.integers(1, new - 1))
    root = merkle.root(LEAVES[:new])
    assert cose_receipt.verify_consistency(consistency(old, new), merkle.root(LEAVES[:old]), KEYS) == (old, new, root)
    with pytest.raises(VerificationError):
        cose_receipt.verify_consistency(consistency(old, new), merkle.leaf_hash(b"another"), KEYS)


def test_a_tree_of_one_leaf_has_an_empty_path() -> None:
    data = inclusion(0, 1)
    assert cbor2.loads(cbor2.loads(data).value[1][396][-1][0]) == [1, 0, []]
    assert cose_receipt.verify_inclusion(data, LEAVES[0], KEYS).root == LEAVES[0]


def test_another_cose_library_call_verifies_the_root_as_the_detached_payload() -> None:
    key = COSEKey.new({1: 1, -1: 6, -2: LOG.public_key().public_bytes_raw(), 2: key_id(LOG.public_key())})
    for data, root in (
        (inclusion(17, 20), merkle.root(LEAVES[:20])),
        (consistency(20, 104), merkle.root(LEAVES[:104])),
    ):
        protected, unprotected, payload = COSE.new().decode_with_headers(data, key, detached_payload=root)
        assert (protected[1], protected[395], payload) == (-8, 1, root)
        assert len(unprotected[396]) == 1
        with pytest.raises(Exception, match=r"(?i)verif|signature"):
            COSE.new().decode(data, key, detached_payload=bytes(32))


def test_a_receipt_of_another_cose_library_call_is_read() -> None:
    """Written by cwt alone, from the RFC's words."""
    key = COSEKey.new({1: 1, -1: 6, -2: LOG.public_key().public_bytes_raw(), -4: LOG.private_bytes_raw()})
    proof = cbor2.dumps([3, 2, [merkle.root(LEAVES[:2])]])
    header = {1: -8, 4: key_id(LOG.public_key()), 395: 1, -70602: 3}
    signed = cbor2.loads(COSE.new().encode_and_sign(merkle.root(LEAVES[:3]), key, header, {396: {-1: [proof]}}))
    signed.value[2] = None
    data = cbor2.dumps(signed, canonical=True)
    assert cose_receipt.verify_inclusion(data, LEAVES[2], KEYS).index == 2


def test_a_flipped_bit_anywhere_is_refused() -> None:
    data = inclusion(5, 20)
    for position in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[position] ^= 1 << bit
            with pytest.raises(VerificationError):
                cose_receipt.verify_inclusion(bytes(flipped), LEAVES[5], KEYS)


def test_the_size_of_the_tree_is_signed() -> None:
    """Leaf 2 of 3 hashes as leaf 1 of 2 does: with the root alone signed, a log could be told to be smaller."""
    real = inclusion(2, 3)
    path = merkle.inclusion_path(LEAVES[:3], 2)
    assert merkle.root_of_inclusion(LEAVES[2], 1, 2, path) == merkle.root(LEAVES[:3])
    with pytest.raises(Malformed, match="signed tree size"):
        cose_receipt.parse(changed(real, lambda parts: parts[4].__setitem__(slice(0, 2), [2, 1])))

    def claim(parts: list[Any]) -> None:
        parts[0][-70602] = 2
        parts[4][:2] = [2, 1]

    with pytest.raises(BadSignature):
        cose_receipt.verify_inclusion(changed(real, claim), LEAVES[2], KEYS)


def test_a_proof_of_an_unknown_log_is_not_believed() -> None:
    with pytest.raises(Untrusted):
        cose_receipt.verify_inclusion(inclusion(5, 20), LEAVES[5], KEYS[:1])


def test_one_kind_of_proof_does_not_pass_for_the_other() -> None:
    with pytest.raises(Malformed, match="of consistency, not of inclusion"):
        cose_receipt.verify_inclusion(consistency(5, 20), LEAVES[5], KEYS)
    with pytest.raises(Malformed, match="of inclusion, not of consistency"):
        cose_receipt.verify_consistency(inclusion(5, 20), LEAVES[5], KEYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts[0].update({395: 2}),
        lambda parts: parts[0].pop(395),
        lambda parts: parts[0].pop(-70602),
        lambda parts: parts[0].update({1: -7}),
        lambda parts: parts[0].update({4: b"short"}),
        lambda parts: parts[0].update({5: b"more"}),
        lambda parts: parts.__setitem__(1, {396: {-3: [b"\x80"]}}),
        lambda parts: parts.__setitem__(1, {396: {-1: []}}),
        lambda parts: parts.__setitem__(1, {396: {}}),
        lambda parts: parts.__setitem__(1, {396: {-1: [b"\x80"], -2: [b"\x80"]}}),
        lambda parts: parts.__setitem__(1, {396: {-1: ["text"]}}),
        lambda parts: parts.__setitem__(1, {397: {}}),
        lambda parts: parts.__setitem__(1, {396: {-1: [b"\x83\x01\x00\x80"]}, 4: b""}),
        lambda parts: parts.__setitem__(2, merkle.root(LEAVES[:20])),
        lambda parts: parts[4].__setitem__(0, -20),
        lambda parts: parts[4].__setitem__(0, True),
        lambda parts: parts[4].__setitem__(1, 20),
        lambda parts: parts[4].__setitem__(2, [bytes(31)]),
        lambda parts: parts[4].__setitem__(2, ["x"]),
        lambda parts: parts[4].__setitem__(2, [bytes(32)] * 65),
        lambda parts: parts[4].__setitem__(2, [bytes(32)] * 130),
        lambda parts: parts[4].append(0),
        lambda parts: (parts[0].update({-70602: 2**63}), parts[4].__setitem__(0, 2**63)),
    ],
)
def test_a_receipt_in_another_form_is_refused(change: Callable[[list[Any]], object]) -> None:
    data = inclusion(5, 20)
    assert changed(data, lambda _: None) == data
    with pytest.raises(Malformed):
        cose_receipt.parse(changed(data, change))


def with_path(path: list[bytes], parts: list[Any]) -> None:
    parts[4][2] = path


def test_a_receipt_larger_than_any_is_refused_unread() -> None:
    with pytest.raises(Malformed, match="larger than any COSE receipt"):
        cose_receipt.parse(bytes(cose_receipt.MAX_BYTES + 1))


def test_a_path_of_another_length_is_refused_before_the_signature() -> None:
    for path in ([], [bytes(32)] * 4, [bytes(32)] * 6):
        with pytest.raises(Inconsistent):
            cose_receipt.verify_inclusion(changed(inclusion(5, 20), partial(with_path, path)), LEAVES[5], KEYS)


def test_a_checkpoint_signature_does_not_pass_for_a_receipts() -> None:
    """One key signs both: the text of a note never begins as a COSE Sig_structure does."""
    signed = cbor2.dumps(["Signature1", b"", b"", b""])
    with pytest.raises(UnicodeDecodeError):
        signed.decode()
    assert cose.EDDSA == -8
