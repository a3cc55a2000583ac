"""What stands behind the digests of a receipt, and how they are made.

One random key of 32 bytes a request, the salt key, gives every salt. Handing over the salt of one leaf, its token id
and its path opens that one token and nothing else; handing over the salt key opens the whole answer.

    salt_i        HMAC-SHA256(salt_key, u64(i))
    leaf i        SHA-256(0x00 || domain || u8(size of request_id) || request_id || u64(i) || u32(token_id) || salt_i)
    prompt digest SHA-256(domain || HMAC-SHA256(salt_key, domain) || u32(token_id) ...)
    stop digest   SHA-256(domain || HMAC-SHA256(salt_key, domain) || (u32(size) || UTF-8) ...)

All integers are big-endian. Every part but the last has a fixed size or its size before it, so no two
inputs share bytes.
Leaves hold token ids, not embeddings: an embedding is the provider's to choose, a token id is what was billed.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from countersign.verify import merkle
from countersign.verify.errors import Malformed
from countersign.verify.payload import FinishReason, Output, Segment

SALT_KEY_SIZE = 32
MAX_STOPS = 256

_TOKEN_DOMAIN = b"countersign/token/v1"
_PROMPT_DOMAIN = b"countersign/prompt/v1"
_STOP_DOMAIN = b"countersign/stop/v1"


@dataclass(frozen=True, slots=True)
class Openings:
    """All that the receipt's digests hide. Not printed: it is the client's text."""

    salt_key: bytes = field(repr=False)
    prompt_token_ids: tuple[int, ...] = field(repr=False)
    output_token_ids: tuple[int, ...] = field(repr=False)
    stop: tuple[str, ...] = field(default=(), repr=False)


def prompt_digest(token_ids: Sequence[int], salt_key: bytes) -> bytes:
    """The salted digest (32 bytes) of the prompt as the target sees it."""
    return salted_prompt(token_ids, prompt_salt(salt_key))


def stop_digest(stop: Sequence[str], salt_key: bytes) -> bytes:
    """The salted digest (32 bytes) of the stop strings, in the order in which they were asked for."""
    return salted_stop(stop, stop_salt(salt_key))


def prompt_salt(salt_key: bytes) -> bytes:
    """The salt (32 bytes) of the prompt's digest."""
    return _salt(salt_key, _PROMPT_DOMAIN)


def stop_salt(salt_key: bytes) -> bytes:
    """The salt (32 bytes) of the stop strings' digest."""
    return _salt(salt_key, _STOP_DOMAIN)


def salted_prompt(token_ids: Sequence[int], salt: bytes) -> bytes:
    """``prompt_digest`` for whoever has that salt only."""
    return hashlib.sha256(_PROMPT_DOMAIN + salt + pack_ids(token_ids)).digest()


def salted_stop(stop: Sequence[str], salt: bytes) -> bytes:
    """``stop_digest`` for whoever has that salt only."""
    texts = [text.encode() for text in stop]
    packed = b"".join(struct.pack(">I", len(text)) + text for text in texts)
    return hashlib.sha256(_STOP_DOMAIN + salt + packed).digest()


def token_salt(salt_key: bytes, index: int) -> bytes:
    """The salt (32 bytes) of output token ``index``."""
    return _salt(salt_key, struct.pack(">Q", index))


def token_leaf(request_id: str, index: int, token_id: int, salt: bytes) -> bytes:
    """The leaf hash (32 bytes) of output token ``index``."""
    name = request_id.encode()
    entry = struct.pack(">B", len(name)) + name + struct.pack(">QI", index, token_id) + salt
    return merkle.leaf_hash(_TOKEN_DOMAIN + entry)


def token_leaves(request_id: str, token_ids: Sequence[int], salt_key: bytes) -> list[bytes]:
    """The leaf hashes of a whole output, in order."""
    return [token_leaf(request_id, i, token, token_salt(salt_key, i)) for i, token in enumerate(token_ids)]


def build_output(
    request_id: str,
    token_ids: Sequence[int],
    salt_key: bytes,
    *,
    finish_reason: FinishReason,
    segments: Sequence[Segment] | None = None,
) -> Output:
    """The output part of a receipt. Without ``segments`` every token is visible to the client."""
    if segments is None:
        segments = (Segment("visible", len(token_ids)),) if token_ids else ()
    hidden = sum(segment.tokens for segment in segments if segment.kind == "hidden")
    return Output(
        root=merkle.root(token_leaves(request_id, token_ids, salt_key)),
        tokens=len(token_ids),
        hidden=hidden,
        visible=len(token_ids) - hidden,
        segments=tuple(segments),
        finish_reason=finish_reason,
    )


def to_cbor(openings: Openings) -> dict[str, object]:
    """The map that travels in the unprotected header. Token ids are packed as u32, so that few CBOR items suffice."""
    return {
        "salt_key": openings.salt_key,
        "prompt": pack_ids(openings.prompt_token_ids),
        "output": pack_ids(openings.output_token_ids),
        "stop": list(openings.stop),
    }


def from_cbor(value: object) -> Openings:
    """What ``to_cbor`` wrote.

    Raises:
        Malformed: anything else.
    """
    match value:
        case {
            "salt_key": bytes(salt_key),
            "prompt": bytes(prompt),
            "output": bytes(output),
            "stop": list(stop),
            **more,
        }:
            texts = tuple(text for text in stop if isinstance(text, str))
            plain = len(texts) == len(stop) <= MAX_STOPS and "" not in texts  # which would end every answer
            if not more and len(salt_key) == SALT_KEY_SIZE and plain:
                return Openings(salt_key, unpack_ids(prompt), unpack_ids(output), texts)
    raise Malformed("the openings are not of the form that receipts use")


def pack_ids(token_ids: Sequence[int]) -> bytes:
    """Token ids as big-endian u32."""
    return struct.pack(f">{len(token_ids)}I", *token_ids)


def unpack_ids(data: bytes) -> tuple[int, ...]:
    """The token ids in ``data``."""
    if len(data) % 4:
        raise Malformed("packed token ids are not a multiple of 4 bytes", size=len(data))
    return struct.unpack(f">{len(data) // 4}I", data)


def _salt(salt_key: bytes, purpose: bytes) -> bytes:
    return hmac.digest(salt_key, purpose, "sha256")
