"""Signed statements that are no receipts, such as calibration profiles: a COSE_Sign1 with Ed25519 over CBOR.

    18([ << {1: -8, 3: content type, 4: key id} >>, {}, << payload >>, signature of 64 bytes ])

As receipts, but nothing outside the signature. The content type is part of what is signed, so that no statement can
stand for one of another kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import cbor2
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cwt import COSE, COSEKey
from cwt.exceptions import CWTError

from countersign.verify import cbor
from countersign.verify.envelope import key_id
from countersign.verify.errors import BadSignature, Malformed, NotCheckable, Untrusted

MAX_STATEMENT_BYTES = 1024 * 1024

_SIGN1_TAG = 18
_EDDSA = -8
_ALG, _CONTENT_TYPE, _KID = 1, 3, 4  # RFC 9052 table 3
_KTY, _CRV, _X, _D, _OKP, _ED25519 = 1, -1, -2, -4, 1, 6  # RFC 9053 table 20


def sign(payload: object, content_type: str, key: Ed25519PrivateKey) -> bytes:
    """The signed statement; ``payload`` is what :mod:`countersign.verify.cbor` can hold."""
    protected = {_ALG: _EDDSA, _CONTENT_TYPE: content_type, _KID: key_id(key.public_key())}
    signer = COSEKey.new(_cose_key(key.public_key()) | {_D: key.private_bytes_raw()})
    sealed = COSE.new().encode_and_sign(cbor.dumps(payload), signer, protected)
    tagged = cbor2.loads(sealed)
    return cbor.dumps(cbor2.CBORTag(_SIGN1_TAG, [cbor.dumps(protected), {}, tagged.value[2], tagged.value[3]]))


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
    match cbor.loads(data, tag=_SIGN1_TAG):
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
    message = cbor2.CBORTag(_SIGN1_TAG, [protected, {}, payload, signature])
    try:
        COSE.new().decode(message, COSEKey.new(_cose_key(keys[signer]) | {2: signer}))
    except (CWTError, ValueError) as error:
        raise BadSignature("the signature is not the key's over these bytes", key=signer) from error
    return value


def _signer(protected: bytes, content_type: str) -> bytes:
    match cbor.loads(protected):
        case {1: -8, 3: str(found), 4: bytes(kid), **more}:
            if found != content_type:
                raise Malformed("a statement of another kind", wanted=content_type, found=found)
            if len(kid) == hashlib.sha256().digest_size and not more:
                return kid
    raise Malformed("the protected header is not algorithm EdDSA, a content type and a key id")


def _cose_key(key: Ed25519PublicKey) -> dict[int, int | bytes]:
    return {_KTY: _OKP, _CRV: _ED25519, _X: key.public_bytes_raw()}
