"""What strangers can hand to the verifier: each target reads bytes, and real objects to begin from.

A target may raise ``VerificationError`` and nothing else. Some sign what they are given: a change behind a signature
would never be read otherwise.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace

import cbor2

from countersign.services.auditor import tlog_witness
from countersign.verify import (
    cbor,
    cose_receipt,
    envelope,
    equivocation,
    fingerprints,
    merkle,
    payload,
    statement,
    verdict,
)
from countersign.verify.coin import challenge
from countersign.verify.cose import ALG, CONTENT_TYPE, EDDSA, KID, encode1, key_id, sign1
from countersign.verify.equivocation import Equivocation
from countersign.verify.errors import VerificationError
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import Checkpoint, KeyKind, NoteKey
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.tiles import Tile, pack_entries, split_entries, split_hashes
from countersign.verify.openings import to_cbor
from countersign.verify.partial import open_leaves, opened_root, withhold
from countersign.verify.partial import to_cbor as partial_to_cbor
from countersign.verify.receipt import (
    ReceiptVerifier,
    attach_proofs,
    parse,
    receipt_digest,
    sign,
    strip,
)
from countersign.verify.testing import example_receipt, signing_key
from countersign.verify.trust import TrustPolicy, TrustRules

TARGET, LOG, WITNESS = signing_key(1), signing_key(2), signing_key(3)
ORIGIN = "log.example/receipts"
LOG_KEY = NoteKey(ORIGIN, LOG.public_key())
WITNESS_KEY = NoteKey("witness.example", WITNESS.public_key(), KeyKind.WITNESS)
RULES = TrustRules(
    TrustPolicy((TARGET.public_key(),), logs=(LOG_KEY,), witnesses=(WITNESS_KEY,), now_unix_ms=1_800_000_000_000)
)
STATEMENT = "application/vnd.countersign.fuzz+cbor"

RECEIPT, OPENINGS = example_receipt(range(40), range(100, 124), stop=["\n\n"], stop_token_ids=[7])
FINGERPRINTS = [bytes([index] * 16) for index in range(24)]
COMMITTED = replace(
    RECEIPT,
    evidence=replace(
        RECEIPT.evidence,
        activations=fingerprints.commit(RECEIPT.request_id, FINGERPRINTS, OPENINGS.salt_key),
    ),
)
POSITIONS = (3, 4, 20)
RUNS = ((3, 9), (20, 21))
SIGNED = sign(RECEIPT, OPENINGS, TARGET)
LEAVES = [*(merkle.leaf_hash(b"entry %d" % index) for index in range(300)), merkle.leaf_hash(strip(SIGNED))]
ROOT = merkle.root(LEAVES)


@dataclass(frozen=True, slots=True)
class Target:
    """A reader of bytes, and inputs that it takes."""

    read: Callable[[bytes], object]
    seeds: tuple[bytes, ...]


def _receipt(data: bytes) -> None:
    for read in (parse, strip, receipt_digest):
        with suppress(VerificationError):
            read(data)
    ReceiptVerifier(()).count(RULES.form(data).signed)


def _payload(data: bytes) -> None:
    """The payload of a receipt that is signed well."""
    ReceiptVerifier(()).count(RULES.form(envelope.seal(data, OPENINGS, TARGET).encode()).signed)


def _unsigned(data: bytes) -> None:
    """The unprotected header of a receipt that is signed well."""
    protected, _, body, signature = cbor2.loads(strip(SIGNED)).value
    head = b"\xd2\x84" + cbor2.dumps(protected)
    ReceiptVerifier(()).count(RULES.form(head + data + cbor2.dumps(body) + cbor2.dumps(signature)).signed)


def _note(data: bytes) -> None:
    with suppress(VerificationError):
        notes.parse_note(data)
    with suppress(VerificationError, UnicodeDecodeError):
        NoteKey.parse(data.decode())
    RULES.checkpoint(data)


def _checkpoint(data: bytes) -> None:
    """The text of a checkpoint that is signed well."""
    line = notes.NoteSignature(ORIGIN, LOG_KEY.id, LOG.sign(data))
    RULES.checkpoint(data + b"\n" + line.line().encode())


def _cose_receipt(data: bytes) -> None:
    for verify, known in ((cose_receipt.verify_inclusion, LEAVES[-1]), (cose_receipt.verify_consistency, ROOT)):
        with suppress(VerificationError):
            verify(data, known, [LOG.public_key()])


def _proof(data: bytes) -> None:
    """Two numbers and a path, for both kinds of proof."""
    first, second, rest = int.from_bytes(data[:8], "big"), int.from_bytes(data[8:16], "big", signed=True), data[16:]
    path = [rest[start : start + 32] for start in range(0, len(rest), 32)]
    merkle.verify_inclusion(LEAVES[0], first, second, path, ROOT)
    merkle.verify_consistency(first, second, ROOT, LEAVES[0], path)


def _tile(data: bytes) -> None:
    """A name, a tile, a bundle, and a log of which all tiles are this."""
    name, _, body = data.partition(b"\n")
    with suppress(VerificationError, UnicodeDecodeError):
        Tile.parse(name.decode())
    with suppress(VerificationError):
        split_entries(body, 256)
    with suppress(VerificationError):
        split_hashes(body, 256)
    tree = TileTree(lambda _: body)
    for read in (tree.inclusion, tree.consistency, tree.entry):
        with suppress(VerificationError):
            read(5, 300)


def _statement(data: bytes) -> None:
    statement.verify(data, STATEMENT, [TARGET.public_key()])


def _leaves(data: bytes) -> None:
    """An answer to a challenge for hidden tokens."""
    opened_root(RECEIPT.request_id, RECEIPT.output.tokens, RUNS, challenge.decode(data))


def _fingerprints(data: bytes) -> None:
    """An answer to a challenge for activations."""
    opened = fingerprints.decode(data)
    fingerprints.check(COMMITTED, opened, POSITIONS)


def _stated(data: bytes, content_type: str) -> bytes:
    """A signed statement of these bytes."""
    header: dict[int, object] = {ALG: EDDSA, CONTENT_TYPE: content_type, KID: key_id(TARGET.public_key())}
    protected, signature = sign1(header, data, TARGET)
    return encode1(protected, {}, data, signature)


def _verdict(data: bytes) -> None:
    """The payload of a verdict that is signed well."""
    verdict.verify(_stated(data, verdict.CONTENT_TYPE), [TARGET.public_key()]).was_drawn(LOG_KEY)


def _equivocation(data: bytes) -> None:
    """The payload of evidence against a log that is signed well."""
    kind = equivocation.CONTENT_TYPE
    value = statement.verify(_stated(data, kind), kind, [TARGET.public_key()])
    Equivocation.from_cbor(value).verify([LOG_KEY])


def _witness(data: bytes) -> None:
    """What is asked of a witness over HTTP, and what it answers."""
    with suppress(VerificationError):
        tlog_witness.parse_size(data)
    _, _, note = tlog_witness.parse_request(data)
    RULES.checkpoint(note)


def _carrying() -> bytes:
    size = len(LEAVES)
    proof = cose_receipt.prove_inclusion(ROOT, size, size - 1, merkle.inclusion_path(LEAVES, size - 1), LOG)
    return attach_proofs(SIGNED, [proof], _cosigned())


def _cosigned() -> bytes:
    note = notes.sign(Checkpoint(ORIGIN, len(LEAVES), ROOT, ("extension",)), LOG)
    return notes.cosign(note, WITNESS, WITNESS_KEY.name, time=1_750_000_000)


def _proofs() -> tuple[bytes, ...]:
    inclusion = merkle.inclusion_path(LEAVES, 7)
    consistency = merkle.consistency_path(LEAVES, 123)
    return (
        struct.pack(">QQ", 7, len(LEAVES)) + b"".join(inclusion),
        struct.pack(">QQ", 123, len(LEAVES)) + b"".join(consistency),
    )


def _answer() -> bytes:
    opened = fingerprints.open_positions(RECEIPT.request_id, FINGERPRINTS, OPENINGS.salt_key, POSITIONS)
    return fingerprints.encode(opened)


def _drawn() -> bytes:
    """A verdict's payload, as ``Verdict.sign`` makes it."""
    note = notes.sign(Checkpoint(ORIGIN, len(LEAVES), ROOT, (f"{verdict.SHARE_LINE}1.0",)), LOG)
    finding = verdict.Finding("form", "pass", "signed", {"tokens": 24.0})
    found = verdict.Verdict(bytes(32), RECEIPT.request_id, "pass", (finding,), 7, note, 1_750_000_000_000)
    body: bytes = cbor2.loads(found.sign(TARGET)).value[2]
    return body


def _forked() -> tuple[bytes, ...]:
    """Evidence of two roots for one size, and of a history that was rewritten."""
    forked = notes.sign(Checkpoint(ORIGIN, len(LEAVES), LEAVES[0]), LOG)
    rewritten = notes.sign(Checkpoint(ORIGIN, 123, LEAVES[0]), LOG)
    steps = tuple(merkle.consistency_path(LEAVES, 123))
    evidence = (Equivocation(_cosigned(), forked), Equivocation(rewritten, _cosigned(), steps))
    return tuple(cbor.dumps(found.to_cbor()) for found in evidence)


def _targets() -> dict[str, Target]:
    partly = withhold(OPENINGS, RECEIPT.request_id, [(0, 5), (9, 20)])
    size = len(LEAVES)
    cose = (
        cose_receipt.prove_inclusion(ROOT, size, size - 1, merkle.inclusion_path(LEAVES, size - 1), LOG),
        cose_receipt.prove_inclusion(LEAVES[0], 1, 0, [], LOG),
        cose_receipt.prove_consistency(ROOT, 128, size, merkle.consistency_path(LEAVES, 128), LOG),
    )
    unprotected = cbor2.loads(_carrying()).value[1]
    opened = [{-70600: to_cbor(OPENINGS)}, {-70600: partial_to_cbor(partly)}, {394: list(cose)}, unprotected, {}]
    return {
        "receipt": Target(_receipt, (SIGNED, strip(SIGNED), _carrying())),
        "payload": Target(_payload, (payload.encode(RECEIPT), payload.encode(COMMITTED))),
        "unsigned": Target(_unsigned, tuple(cbor2.dumps(part, canonical=True) for part in opened)),
        "note": Target(_note, (_cosigned(), LOG_KEY.encode().encode())),
        "checkpoint": Target(_checkpoint, (Checkpoint(ORIGIN, size, ROOT, ("extension",)).encode(),)),
        "cose receipt": Target(_cose_receipt, cose),
        "proof": Target(_proof, _proofs()),
        "tile": Target(
            _tile,
            (
                b"tile/0/x001/234.p/9\n" + b"".join(LEAVES[:256]),
                b"tile/entries/001\n" + pack_entries(b"entry %d" % index for index in range(256)),
            ),
        ),
        "statement": Target(_statement, (statement.sign({"version": 1, "of": [1.5, "x", b"y"]}, STATEMENT, TARGET),)),
        "verdict": Target(_verdict, (_drawn(),)),
        "equivocation": Target(_equivocation, _forked()),
        "witness": Target(
            _witness, (tlog_witness.encode_request(123, merkle.consistency_path(LEAVES, 123), _cosigned()),)
        ),
        "fingerprints": Target(_fingerprints, (_answer(),)),
        "leaves": Target(
            _leaves,
            (challenge.encode(open_leaves(RECEIPT.request_id, range(24), OPENINGS.salt_key, RUNS)),),
        ),
    }


TARGETS = _targets()
SEEDS = tuple(seed for target in TARGETS.values() for seed in target.seeds)
MAX_INPUT_BYTES = 16 * 1024
"""Of fuzzed inputs. The largest ones that are read at all have a test of their own."""


def survives(name: str, data: bytes) -> None:
    """Reads ``data``; lets through whatever is not a ``VerificationError``."""
    with suppress(VerificationError):
        TARGETS[name].read(data)
