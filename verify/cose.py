"""COSE_Sign1 with Ed25519 (RFC 9052 section 4.2; RFC 9053 section 2.2), by ``cwt`` and ``cryptography``.

    18([ << protected header >>, unprotected header, payload or nil, signature of 64 bytes ])

What is signed is ["Signature1", protected, b"", payload], whether the payload travels inside or not.
"""

from __future__ import annotations

import hashlib

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cwt import COSE, COSEKey
from cwt.exceptions import CWTError

from countersign.verify import cbor
from countersign.verify.errors import BadSignature

SIGN1_TAG = 18
EDDSA = -8
ALG, CONTENT_TYPE, KID = 1, 3, 4  # RFC 9052 table 3
KEY_ID_SIZE = 32

_KTY, _CRV, _X, _D, _OKP, _ED25519 = 1, -1, -2, -4, 1, 6  # RFC 9053 table 20


def key_id(key: Ed25519PublicKey) -> bytes:
    """SHA-256 (32 bytes) of the raw public key."""
    return hashlib.sha256(key.public_bytes_raw()).digest()


def sign1(protected: dict[int, object], payload: bytes, key: Ed25519PrivateKey) -> tuple[bytes, bytes]:
    """The protected header's bytes and the signature (64 bytes) over it and the payload."""
    signer = COSEKey.new(_cose_key(key.public_key()) | {_D: key.private_bytes_raw()})
    signed = cbor2.loads(COSE.new().encode_and_sign(payload, signer, protected))
    return cbor.dumps(protected), signed.value[3]


def verify1(protected: bytes, payload: bytes, signature: bytes, key: Ed25519PublicKey) -> None:
    """Checks the signature over protected header and payload. The header must name the key by its ``key_id``.

    Raises:
        BadSignature: it is not this key's.
    """
    name = key_id(key)
    message = cbor2.CBORTag(SIGN1_TAG, [protected, {}, payload, signature])
    try:
        COSE.new().decode(message, COSEKey.new(_cose_key(key) | {2: name}))
    except (CWTError, ValueError) as error:
        raise BadSignature("the signature is not the key's over these bytes", key=name) from error


def encode1(protected: bytes, unprotected: dict[int, object], payload: bytes | None, signature: bytes) -> bytes:
    """The tagged message in deterministic CBOR."""
    return cbor.dumps(cbor2.CBORTag(SIGN1_TAG, [protected, unprotected, payload, signature]))


def _cose_key(key: Ed25519PublicKey) -> dict[int, int | bytes]:
    return {_KTY: _OKP, _CRV: _ED25519, _X: key.public_bytes_raw()}
