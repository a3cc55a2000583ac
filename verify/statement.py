"""Signed statements that are no receipts, such as calibration profiles: a COSE_Sign1 with Ed25519 over CBOR.

    18([ << {1: -8, 3: content type, 4: key id} >>, {}, << payload >>, signature of 64 bytes ])

As receipts, but nothing outside the signature. The content type is part of what is signed, so that no statement can
stand for one of another kind.
"""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from countersign.verify import cbor
from countersign.verify.cose import (
    ALG,
    CONTENT_TYPE,
    EDDSA,
    KEY_ID_SIZE,
    KID,
    SIGN1_TAG,
    encode1,
    key_id,
    sign1,
    verify1,
)
from countersign.verify.errors import Malformed, NotCheckable, Untrusted

MAX_STATEMENT_BYTES = 1024 * 1024


def sign(payload: object, content_type: str, key: Ed25519PrivateKey) -> bytes:
    """The signed statement; ``payload`` is what :mod:`countersign.verify.cbor` can hold."""
    encoded = cbor.dumps(payload)
    protected, signature = sign1({ALG: EDDSA, CONTENT_TYPE: content_type, KID: key_id(key.public_key())}, encoded, key)
    return encode1(protected, {}, encoded, signature)


def verify(data: bytes, content_type: str, trusted_keys: Iterable[Ed25519PublicKey]) -> object:
    """The payload of a statement that a trusted key has signed.

    Raises:
        Malformed: no statement of this kind, in its one encoding, of at most 1 MiB.
        NotCheckable: there is no trusted key at all.
        Untrusted: signed by another key.
        BadSignature: it is not this key's.
    """
    if len(data) > MAX_STATEMENT_BYTES:
        raise Malformed("larger than any statement", size=len(data), limit=MAX_STATEMENT_BYTES)
    match cbor.loads(data, tag=SIGN1_TAG):
        case [bytes(protected), dict(unprotected), bytes(payload), bytes(signature)] if not unprotected:
            signer = _signer(protected, content_type)
        case _:
            raise Malformed("not a COSE_Sign1 with its payload inside and nothing unsigned")
    value = cbor.loads(payload)
    keys = {key_id(key): key for key in trusted_keys}
    if not keys:
        raise NotCheckable("no trusted key to check the signature with", signer=signer)
    if signer not in keys:
        raise Untrusted("signed by a key that is not trusted", signer=signer)
    verify1(protected, payload, signature, keys[signer])
    return value


def _signer(protected: bytes, content_type: str) -> bytes:
    match cbor.loads(protected):
        case {1: -8, 3: str(found), 4: bytes(kid), **more}:
            if found != content_type:
                raise Malformed("a statement of another kind", wanted=content_type, found=found)
            if len(kid) == KEY_ID_SIZE and not more:
                return kid
    raise Malformed("the protected header is not algorithm EdDSA, a content type and a key id")
