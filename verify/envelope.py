"""The envelope: a COSE_Sign1 (RFC 9052 section 4.2) with Ed25519, and openings that can be cut off.

    18([ << {1: -8, 3: "application/vnd.countersign.receipt+cbor", 4: key id} >>,   protected header, signed
         {394: [COSE receipts], -70600: openings, -70601: checkpoint},             unprotected header, not signed
         << payload >>, signature of 64 bytes ])

The key id is the SHA-256 of the raw public key, whole. The openings lie outside the signature, as SD-CWT carries its
disclosures; what binds them are the salted digests in the payload. So ``strip`` cuts them off and the rest stays valid.
So it is with what a log gives: proofs that the receipt is in it (RFC 9942 section 4) and a signed checkpoint. Each part
of the unprotected header may be absent.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify import cbor
from countersign.verify.cose import ALG, EDDSA, KEY_ID_SIZE, KID, SIGN1_TAG, encode1, key_id, sign1, verify1
from countersign.verify.cose import CONTENT_TYPE as CTY
from countersign.verify.errors import Malformed
from countersign.verify.partial import Disclosure, from_cbor, to_cbor

CONTENT_TYPE = "application/vnd.countersign.receipt+cbor"
MAX_RECEIPT_BYTES = 4 * 1024 * 1024
"""A million token ids, or 116,000 with a salt each. To read that many takes 30 ms and 40 MB."""

MAX_PROOFS = 8
MAX_PROOF_BYTES = 4096
MAX_CHECKPOINT_BYTES = 16 * 1024
MAX_PAYLOAD_BYTES = 65_000
"""So that a receipt without openings fits into an entry of a transparency log (65,535 bytes)."""

_RECEIPTS = 394  # RFC 9942
_OPENINGS, _CHECKPOINT = -70600, -70601  # of the range for private use, below -65536 (RFC 9052 section 11.1)


@dataclass(frozen=True, slots=True)
class Envelope:
    """A receipt taken apart, nothing verified."""

    protected: bytes
    openings: Disclosure | None
    payload: bytes
    signature: bytes
    key_id: bytes
    proofs: tuple[bytes, ...] = ()
    checkpoint: bytes | None = None

    def encode(self) -> bytes:
        """The receipt's bytes."""
        unprotected: dict[int, object] = {}
        if self.proofs:
            unprotected[_RECEIPTS] = list(self.proofs)
        if self.openings is not None:
            unprotected[_OPENINGS] = to_cbor(self.openings)
        if self.checkpoint is not None:
            unprotected[_CHECKPOINT] = self.checkpoint
        return encode1(self.protected, unprotected, self.payload, self.signature)

    def bare(self) -> bytes:
        """The receipt's bytes without anything that is not signed: its entry in a transparency log."""
        return Envelope(self.protected, None, self.payload, self.signature, self.key_id).encode()

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the bare receipt: its name, the same whatever travels with it."""
        return hashlib.sha256(self.bare()).digest()


def seal(payload: bytes, openings: Disclosure | None, key: Ed25519PrivateKey) -> Envelope:
    """Signs the payload."""
    kid = key_id(key.public_key())
    protected, signature = sign1({ALG: EDDSA, CTY: CONTENT_TYPE, KID: kid}, payload, key)
    return Envelope(protected, openings, payload, signature, kid)


def unseal(data: bytes) -> Envelope:
    """Takes a receipt apart.

    Raises:
        Malformed: not a receipt of at most 4 MiB in the one encoding that is allowed.
    """
    if not data:
        raise Malformed("there is nothing in it: a receipt has at least some hundred bytes")
    if len(data) > MAX_RECEIPT_BYTES:
        raise Malformed("larger than any receipt", limit=MAX_RECEIPT_BYTES)
    match cbor.loads(data, tag=SIGN1_TAG):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)]:
            if not set(unprotected) <= {_RECEIPTS, _OPENINGS, _CHECKPOINT}:
                raise Malformed("the unprotected header holds something else than openings and what a log gives")
            return Envelope(
                protected=protected,
                openings=_openings(unprotected),
                payload=payload,
                signature=signature,
                key_id=_key_id_in(protected),
                proofs=_proofs(unprotected),
                checkpoint=_checkpoint(unprotected),
            )
    raise Malformed("not a COSE_Sign1 with its payload inside")


def check_signature(envelope: Envelope, key: Ed25519PublicKey) -> None:
    """Checks the signature over protected header and payload.

    Raises:
        BadSignature: it is not this key's.
    """
    verify1(envelope.protected, envelope.payload, envelope.signature, key)


def _key_id_in(protected: bytes) -> bytes:
    match cbor.loads(protected):
        case {1: -8, 3: str(content_type), 4: bytes(kid), **more}:
            if content_type == CONTENT_TYPE and len(kid) == KEY_ID_SIZE and not more:
                return kid
    raise Malformed("the protected header is not algorithm EdDSA, the content type of receipts and a key id")


def _proofs(unprotected: dict[object, object]) -> tuple[bytes, ...]:
    proofs = unprotected.get(_RECEIPTS, ())
    if isinstance(proofs, list) and 1 <= len(proofs) <= MAX_PROOFS:
        found = tuple(proof for proof in proofs if isinstance(proof, bytes) and 0 < len(proof) <= MAX_PROOF_BYTES)
        if len(found) == len(proofs):
            return found
    if _RECEIPTS in unprotected:
        raise Malformed("header 394 is not a few COSE receipts of at most 4 KiB")
    return ()


def _checkpoint(unprotected: dict[object, object]) -> bytes | None:
    note = unprotected.get(_CHECKPOINT)
    if isinstance(note, bytes) and 0 < len(note) <= MAX_CHECKPOINT_BYTES:
        return note
    if _CHECKPOINT in unprotected:
        raise Malformed("the checkpoint in the unprotected header is not a note of at most 16 KiB")
    return None


def _openings(unprotected: dict[object, object]) -> Disclosure | None:
    return from_cbor(unprotected[_OPENINGS]) if _OPENINGS in unprotected else None
