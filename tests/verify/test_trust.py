"""The threats to a receipt that is in a log, and to the log, one test each."""

from __future__ import annotations

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify import cose_receipt, merkle
from countersign.verify.audit import audit
from countersign.verify.errors import (
    BadSignature,
    Inconsistent,
    Malformed,
    NotCheckable,
    Untrusted,
    VerificationError,
)
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey, cosign
from countersign.verify.log.checkpoint import sign as sign_checkpoint
from countersign.verify.receipt import attach_proofs, parse, receipt_digest, sign, strip
from countersign.verify.testing import example_receipt, signing_key
from countersign.verify.trust import SKEW_MS, TrustPolicy, TrustRules

TARGET, LOG, OTHER_LOG = signing_key(1), signing_key(2), signing_key(3)
WITNESSES = [signing_key(number) for number in (4, 5, 6)]
ORIGIN = "log.example/receipts"
LOG_KEY = NoteKey(ORIGIN, LOG.public_key())
WITNESS_KEYS = tuple(
    NoteKey(f"witness{number}.example", key.public_key(), KeyKind.WITNESS) for number, key in enumerate(WITNESSES)
)
POLICY = TrustPolicy((TARGET.public_key(),), logs=(LOG_KEY,))
DEMANDING = dataclasses.replace(POLICY, logged=True)

RECEIPT = sign(*example_receipt(), TARGET)
FINISHED_MS = parse(RECEIPT).receipt.usage.finished_unix_ms
ENTRIES = [strip(RECEIPT) if index == 11 else b"entry %d" % index for index in range(20)]
LEAVES = [merkle.leaf_hash(entry) for entry in ENTRIES]


def proof(size: int = 20, index: int = 11, key: Ed25519PrivateKey = LOG) -> bytes:
    leaves = LEAVES[:size]
    path = merkle.inclusion_path(leaves, index)
    return cose_receipt.prove_inclusion(merkle.root(leaves), size, index, path, key)


def checkpoint(size: int = 20, *, witnesses: int = 0, root: bytes | None = None, key: Ed25519PrivateKey = LOG) -> bytes:
    note = sign_checkpoint(Checkpoint(ORIGIN, size, root or merkle.root(LEAVES[:size])), key)
    for number in range(witnesses):
        note = cosign(note, WITNESSES[number], WITNESS_KEYS[number].name, time=1_750_000_000)
    return note


def rules(policy: TrustPolicy = POLICY, **changes: object) -> TrustRules:
    return TrustRules(dataclasses.replace(policy, **changes))  # type: ignore[arg-type]


def test_a_receipt_that_carries_its_proof_is_found_in_the_log_offline() -> None:
    found = rules(DEMANDING).form(attach_proofs(RECEIPT, [proof()], checkpoint()))
    assert [(part.size, part.index) for part in found.included] == [(20, 11)]
    assert found.checkpoint is not None
    assert found.checkpoint.checkpoint.root == merkle.root(LEAVES)
    assert found.unchecked == ()


def test_what_travels_with_a_receipt_changes_neither_its_digest_nor_its_log_entry() -> None:
    carrying = attach_proofs(RECEIPT, [proof()], checkpoint())
    assert receipt_digest(carrying) == receipt_digest(RECEIPT)
    assert strip(carrying) == strip(RECEIPT)
    assert parse(carrying).openings == parse(RECEIPT).openings
    assert attach_proofs(carrying, []) == RECEIPT


def test_a_receipt_without_a_proof_holds_unless_one_is_demanded() -> None:
    assert rules().form(RECEIPT).included == ()
    with pytest.raises(NotCheckable, match="no proof"):
        rules(DEMANDING).form(RECEIPT)


def test_the_proof_of_another_receipt_is_refused() -> None:
    for index in (10, 12):
        with pytest.raises(BadSignature):
            rules().form(attach_proofs(RECEIPT, [proof(index=index)]))


def test_a_proof_by_a_stranger_counts_for_nothing() -> None:
    carrying = attach_proofs(RECEIPT, [proof(key=OTHER_LOG)])
    found = rules().form(carrying)
    assert found.included == ()
    assert "not trusted" in found.unchecked[0]
    with pytest.raises(NotCheckable):
        rules(DEMANDING).form(carrying)


def test_one_wrong_proof_beside_a_right_one_is_refused() -> None:
    with pytest.raises(VerificationError):
        rules().form(attach_proofs(RECEIPT, [proof(), proof(index=12)]))


def test_a_checkpoint_with_another_root_of_the_same_size_is_an_inconsistent_log() -> None:
    with pytest.raises(Inconsistent, match="two roots"):
        rules().form(attach_proofs(RECEIPT, [proof()], checkpoint(root=bytes(32))))


def test_two_proofs_of_one_size_with_two_roots_are_an_inconsistent_log() -> None:
    """The receipt is in both trees, and no checkpoint is carried that would tell which one is shown to others."""
    forked = [merkle.leaf_hash(b"forked"), *LEAVES[1:]]
    other = cose_receipt.prove_inclusion(merkle.root(forked), 20, 11, merkle.inclusion_path(forked, 11), LOG)
    assert rules().form(attach_proofs(RECEIPT, [other])).included
    with pytest.raises(Inconsistent, match="two roots"):
        rules().form(attach_proofs(RECEIPT, [proof(), other]))
    assert len(rules().form(attach_proofs(RECEIPT, [proof(), proof(15)])).included) == 2


def test_a_checkpoint_of_another_size_says_nothing_of_the_proof() -> None:
    found = rules().form(attach_proofs(RECEIPT, [proof()], checkpoint(19)))
    assert found.checkpoint is None
    assert "no proof here leads to" in found.unchecked[0]


def test_a_checkpoint_of_another_trusted_log_of_that_size_says_nothing_of_the_proof() -> None:
    other = NoteKey("other.example", OTHER_LOG.public_key())
    both = rules(logs=(LOG_KEY, other), witnesses=WITNESS_KEYS)
    for root in (merkle.root(LEAVES), bytes(32)):
        note = cosign(
            sign_checkpoint(Checkpoint(other.name, 20, root), OTHER_LOG), WITNESSES[0], WITNESS_KEYS[0].name, time=1
        )
        found = both.form(attach_proofs(RECEIPT, [proof()], note))
        assert (found.checkpoint, found.witnesses, len(found.unchecked)) == (None, 0, 1)


def test_witnesses_are_counted_each_once_and_only_known_ones() -> None:
    seen = rules(DEMANDING, witnesses=WITNESS_KEYS, quorum=2)
    assert len(seen.form(attach_proofs(RECEIPT, [proof()], checkpoint(witnesses=2))).checkpoint.signers) == 3  # type: ignore[union-attr]
    with pytest.raises(NotCheckable, match="fewer witnesses"):
        seen.form(attach_proofs(RECEIPT, [proof()], checkpoint(witnesses=1)))
    with pytest.raises(NotCheckable, match="no checkpoint"):
        seen.form(attach_proofs(RECEIPT, [proof()]))
    unknown = rules(DEMANDING, witnesses=WITNESS_KEYS[2:], quorum=1)
    with pytest.raises(NotCheckable, match="fewer witnesses"):
        unknown.form(attach_proofs(RECEIPT, [proof()], checkpoint(witnesses=2)))


def test_witnesses_that_are_asked_for_are_not_left_out_where_no_log_is_named() -> None:
    asked = rules(logs=(), witnesses=WITNESS_KEYS, quorum=1)
    for carried in (RECEIPT, attach_proofs(RECEIPT, [proof()], checkpoint(witnesses=1))):
        with pytest.raises(NotCheckable, match="no proof"):
            asked.form(carried)


def test_the_key_of_a_log_is_no_witness_and_that_of_a_witness_no_log() -> None:
    with pytest.raises(Untrusted):
        rules(logs=(), witnesses=(LOG_KEY,)).checkpoint(checkpoint())
    with pytest.raises(NotCheckable, match="cosigned: 0"):
        rules(logs=(LOG_KEY, WITNESS_KEYS[0]), quorum=1).checkpoint(checkpoint(witnesses=1))


def test_one_witness_under_two_names_is_one_witness() -> None:
    alias = NoteKey("alias.example", WITNESSES[0].public_key(), KeyKind.WITNESS)
    note = cosign(checkpoint(witnesses=1), WITNESSES[0], alias.name, time=1)
    with pytest.raises(NotCheckable, match="cosigned: 1"):
        rules(witnesses=(WITNESS_KEYS[0], alias), quorum=2).checkpoint(note)


def test_a_checkpoint_that_only_witnesses_signed_is_no_logs() -> None:
    lines = checkpoint(witnesses=1).decode().splitlines(keepends=True)
    note = "".join(line for line in lines if not line.startswith(f"— {ORIGIN} ")).encode()
    with pytest.raises(Untrusted, match="the log that it is of"):
        rules(witnesses=WITNESS_KEYS).checkpoint(note)


def test_a_log_cannot_sign_for_another_logs_origin() -> None:
    stranger = NoteKey("elsewhere.example", OTHER_LOG.public_key())
    note = sign_checkpoint(Checkpoint(ORIGIN, 20, merkle.root(LEAVES)), OTHER_LOG, "elsewhere.example")
    with pytest.raises(Untrusted):
        rules(logs=(LOG_KEY, stranger)).checkpoint(note)


def test_a_log_that_grew_is_believed_and_one_that_shrank_or_forked_is_not() -> None:
    def at(size: int) -> Checkpoint:
        return Checkpoint(ORIGIN, size, merkle.root(LEAVES[:size]))

    path = merkle.consistency_path(LEAVES, 13)
    rules().successor(at(13), at(20), path)
    rules().successor(at(20), at(20), [])
    rules().successor(at(0), at(20), [])
    with pytest.raises(Inconsistent, match="shrunk"):
        rules().successor(at(20), at(13), path)
    with pytest.raises(Inconsistent, match="only grown"):
        rules().successor(dataclasses.replace(at(13), root=bytes(32)), at(20), path)
    with pytest.raises(Inconsistent, match="only grown"):
        rules().successor(at(20), dataclasses.replace(at(20), root=bytes(32)), [])
    with pytest.raises(Inconsistent, match="two logs"):
        rules().successor(dataclasses.replace(at(13), origin="elsewhere"), at(20), path)


def test_one_size_signed_with_two_shares_is_no_log_that_only_grew() -> None:
    """Whoever may choose between two signatures may choose what is audited."""
    root = merkle.root(LEAVES)
    shares = [Checkpoint(ORIGIN, 20, root, (f"countersign-share {share}",)) for share in ("0.5", "0.0")]
    rules().successor(shares[0], shares[0], [])
    with pytest.raises(Inconsistent, match="a draw could be chosen"):
        rules().successor(shares[0], shares[1], [])


def test_clocks_are_bounds_given_as_values() -> None:
    for now in (None, FINISHED_MS - SKEW_MS, FINISHED_MS + 10**12):
        rules(now_unix_ms=now).form(RECEIPT)
    with pytest.raises(Inconsistent, match="future"):
        rules(now_unix_ms=FINISHED_MS - SKEW_MS - 1).form(RECEIPT)
    rules(now_unix_ms=FINISHED_MS + 1000, max_age_ms=1000).form(RECEIPT)
    with pytest.raises(Inconsistent, match="older"):
        rules(now_unix_ms=FINISHED_MS + 1001, max_age_ms=1000).form(RECEIPT)


def test_the_trust_rules_refuse_whatever_the_receipt_rules_refuse() -> None:
    with pytest.raises(Untrusted):
        rules(receipt_keys=(OTHER_LOG.public_key(),)).form(RECEIPT)
    with pytest.raises(NotCheckable):
        rules(receipt_keys=()).form(RECEIPT)
    with pytest.raises(Malformed):
        rules().form(RECEIPT[:-1])


def test_proofs_that_are_too_many_too_long_or_no_receipts_are_refused() -> None:
    for proofs in ([proof()] * 9, [bytes(4097)], [b""]):
        with pytest.raises(Malformed):
            attach_proofs(RECEIPT, proofs)
    for note in (b"", bytes(20_000)):
        with pytest.raises(Malformed):
            attach_proofs(RECEIPT, [], note)
    with pytest.raises(Malformed):
        rules().form(attach_proofs(RECEIPT, [b"no receipt"]))
    with pytest.raises(Malformed):
        rules().form(attach_proofs(RECEIPT, [], b"no note"))


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_of_a_carrying_receipt_is_refused_or_costs_the_checkpoint(position: int, bit: int) -> None:
    carrying = bytearray(attach_proofs(RECEIPT, [proof()], checkpoint()))
    carrying[position % len(carrying)] ^= 1 << bit
    try:
        found = rules(DEMANDING).form(bytes(carrying))
    except VerificationError:
        return
    # Openings are the count level's, and a line of an unknown key counts for nothing.
    assert found.signed.receipt == parse(RECEIPT).receipt
    assert [part.index for part in found.included] == [11]


def test_an_audit_tells_where_the_receipt_is_logged() -> None:
    policy = dataclasses.replace(DEMANDING, witnesses=WITNESS_KEYS, quorum=1)
    carrying = attach_proofs(RECEIPT, [proof()], checkpoint(witnesses=1))
    (form,) = audit(carrying, trusted_keys=[], policy=policy, reference=None, levels=["form"]).levels
    assert form.outcome == "pass"
    assert "entry 11 of 20 of log.example/receipts" in form.summary
    assert "1 witness" in form.summary
    (form,) = audit(RECEIPT, trusted_keys=[], policy=policy, reference=None, levels=["form"]).levels
    assert (form.outcome, "--log-key" in form.help) == ("inconclusive", True)
    (form,) = audit(
        attach_proofs(RECEIPT, [proof(index=3)]), trusted_keys=[], policy=policy, reference=None, levels=["form"]
    ).levels
    assert form.outcome == "fail"


def test_a_receipt_that_names_an_arithmetic_with_more_room_than_was_agreed_is_refused() -> None:
    assert rules(arithmetics=("native fp32", "test fp32")).form(RECEIPT) == rules().form(RECEIPT)
    with pytest.raises(Inconsistent, match="computed otherwise than was agreed") as refusal:
        rules(arithmetics=("native fp32", "native bf16")).form(RECEIPT)
    with pytest.raises(Inconsistent):  # and not merely that a proof is missing
        rules(DEMANDING, arithmetics=("native fp32",)).form(RECEIPT)
    assert refusal.value.evidence == {"named": "test fp32", "agreed": "native fp32, native bf16"}
