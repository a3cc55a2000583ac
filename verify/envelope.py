"""The envelope: a COSE_Sign1 (RFC 9052 section 4.2) with Ed25519, and openings that can be cut off.

    18([ << {1: -8, 3: "application/vnd.countersign.receipt+cbor", 4: key id} >>,   protected header, signed
         {-70600: openings} or {},                                                 unprotected header, not signed
         << payload >>, signature of 64 bytes ])

The key id is the SHA-256 of the raw public key, whole. The openings lie outside the signature, as SD-CWT carries its
disclosures; what binds them are the salted digests in the payload. So ``strip`` cuts them off and the rest stays valid.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cwt import COSE, COSEKey
from cwt.exceptions import CWTError

from countersign.verify import cbor
from countersign.verify.errors import BadSignature, Malformed
from countersign.verify.partial import Disclosure, from_cbor, to_cbor

CONTENT_TYPE = "application/vnd.countersign.receipt+cbor"
MAX_RECEIPT_BYTES = 16 * 1024 * 1024
MAX_PAYLOAD_BYTES = 65_000
"""So that a receipt without openings fits into an entry of a transparency log (65,535 bytes)."""

_SIGN1_TAG = 18
_EDDSA = -8
_ALG, _CONTENT_TYPE, _KID = 1, 3, 4  # RFC 9052 table 3
_OPENINGS = -70600  # of the range for private use, below -65536 (RFC 9052 section 11.1)
_KTY, _CRV, _X, _D, _OKP, _ED25519 = 1, -1, -2, -4, 1, 6  # RFC 9053 table 20


@dataclass(frozen=True, slots=True)
class Envelope:
    """A receipt taken apart, nothing verified."""

    protected: bytes
    openings: Disclosure | None
    payload: bytes
    signature: bytes
    key_id: bytes

    def encode(self) -> bytes:
        """The receipt's bytes."""
        unprotected = {} if self.openings is None else {_OPENINGS: to_cbor(self.openings)}
        return cbor.dumps(cbor2.CBORTag(_SIGN1_TAG, [self.protected, unprotected, self.payload, self.signature]))

    def digest(self) -> bytes:
        """SHA-256 (32 bytes) of the receipt without openings: its name in the log, the same whether stripped or not."""
        bare = Envelope(self.protected, None, self.payload, self.signature, self.key_id)
        return hashlib.sha256(bare.encode()).digest()


def key_id(key: Ed25519PublicKey) -> bytes:
    """SHA-256 (32 bytes) of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).digest()


def seal(payload: bytes, openings: Disclosure | None, key: Ed25519PrivateKey) -> Envelope:
    """Signs the payload."""
    kid = key_id(key.public_key())
    protected = cbor.dumps({_ALG: _EDDSA, _CONTENT_TYPE: CONTENT_TYPE, _KID: kid})
    signer = COSEKey.new(_cose_key(key.public_key()) | {_D: key.private_bytes_raw()})
    sealed = COSE.new().encode_and_sign(payload, signer, {_ALG: _EDDSA, _CONTENT_TYPE: CONTENT_TYPE, _KID: kid})
    signature = cbor2.loads(sealed).value[3]
    return Envelope(protected, openings, payload, signature, kid)


def unseal(data: bytes) -> Envelope:
    """Takes a receipt apart.

    Raises:
        Malformed: not a receipt of at most 16 MiB in the one encoding that is allowed.
    """
    if not data:
        raise Malformed("there is nothing in it: a receipt has at least some hundred bytes")
    if len(data) > MAX_RECEIPT_BYTES:
        raise Malformed("larger than any receipt", limit=MAX_RECEIPT_BYTES)
    match cbor.loads(data, tag=_SIGN1_TAG):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)]:
            return Envelope(protected, _openings(unprotected), payload, signature, _key_id_in(protected))
    raise Malformed("not a COSE_Sign1 with its payload inside")


def check_signature(envelope: Envelope, key: Ed25519PublicKey) -> None:
    """Checks the signature over protected header and payload.

    Raises:
        BadSignature: it is not this key's.
    """
    message = cbor2.CBORTag(_SIGN1_TAG, [envelope.protected, {}, envelope.payload, envelope.signature])
    verifier = COSEKey.new(_cose_key(key) | {2: envelope.key_id})
    try:
        COSE.new().decode(message, verifier)
    except (CWTError, ValueError) as error:
        raise BadSignature("the signature is not the key's over these bytes", key=envelope.key_id) from error


def _key_id_in(protected: bytes) -> bytes:
    match cbor.loads(protected):
        case {1: -8, 3: str(content_type), 4: bytes(kid), **more}:
            if content_type == CONTENT_TYPE and len(kid) == hashlib.sha256().digest_size and not more:
                return kid
    raise Malformed("the protected header is not algorithm EdDSA, the content type of receipts and a key id")


def _openings(unprotected: dict[object, object]) -> Disclosure | None:
    if not unprotected:
        return None
    if set(unprotected) != {_OPENINGS}:
        raise Malformed("the unprotected header holds something else than openings")
    return from_cbor(unprotected[_OPENINGS])


def _cose_key(key: Ed25519PublicKey) -> dict[int, int | bytes]:
    return {_KTY: _OKP, _CRV: _ED25519, _X: key.public_bytes_raw()}
