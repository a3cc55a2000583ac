"""What a receipt says: the signed payload, a deterministic CBOR map of version 1.

Digests are SHA-256. Prompt and stop strings are signed as salted digests and the output as a Merkle root over salted
leaves (see ``openings``), so that a receipt without its openings tells sizes and nothing of the content.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec

from countersign.verify import cbor
from countersign.verify.errors import Malformed

Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Name = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f]{1,200}\Z")]
RequestId = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
UnixMilliseconds = Annotated[int, msgspec.Meta(ge=0, le=253_402_300_799_999)]  # to the end of the year 9999
Probability = Annotated[float, msgspec.Meta(gt=0, le=1)]
FinishReason = Literal["stop", "length", "deadline", "cancelled", "error"]
KvPolicy = Literal["exact", "fp8", "int8"]


@dataclass(frozen=True, slots=True)
class Model:
    """What answered. ``numerics`` names the arithmetic beyond the dtype, ``build`` the release that ran."""

    name: Name
    weights: Digest
    tokenizer: Digest
    config: Digest
    dtype: Literal["fp32", "bf16"]
    numerics: Name
    build: Name


MAX_SEGMENTS = 512


@dataclass(frozen=True, slots=True)
class HiddenMarkers:
    """The token ids between which output is hidden from the client, themselves included."""

    begin: Count
    end: Count


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. ``prompt`` and ``stop`` are salted digests; ``seed`` is None where nothing was drawn.

    ``hidden``: what the deployment keeps to itself; None where the client sees every token.
    """

    prompt: Digest
    prompt_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    temperature: Annotated[float, msgspec.Meta(ge=0, le=1e6)]
    top_k: Count
    top_p: Probability
    seed: Annotated[int, msgspec.Meta(ge=0)] | None
    seed_source: Literal["client", "beacon", "none"]
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    stop_token_ids: Annotated[tuple[Count, ...], msgspec.Meta(max_length=1024)]
    ignore_eos: bool
    stop: Digest
    coupling: Literal["gumbel", "none"]
    opened_unix_ms: UnixMilliseconds
    hidden: HiddenMarkers | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of output tokens that the client sees, or does not (reasoning)."""

    kind: Literal["visible", "hidden"]
    tokens: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]


@dataclass(frozen=True, slots=True)
class Output:
    """What was answered: the Merkle root over the token leaves, and how many tokens of which kind, in order."""

    root: Digest
    tokens: Count
    hidden: Count
    visible: Count
    segments: Annotated[tuple[Segment, ...], msgspec.Meta(max_length=MAX_SEGMENTS)]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Activations:
    """The fingerprints of the states that the output tokens were sampled from, one a token (see ``fingerprints``).

    ``size`` numbers each, of the projection that ``seed`` names; ``root``: of the Merkle tree over their salted leaves.
    """

    scheme: Literal["difr/v1"]
    size: Annotated[int, msgspec.Meta(ge=2, le=128)]
    dtype: Literal["fp16"]
    seed: Annotated[int, msgspec.Meta(ge=0)]
    count: Count
    root: Digest


@dataclass(frozen=True, slots=True)
class Evidence:
    """How it came about. ``commit`` is the SHA-256 of the last commit record before Closed, the ``records``-th.

    ``kv_policy``: "exact", or the lossy form in which the KV of a prefix may have been stored. ``activations``: None
    where the provider keeps no fingerprints.
    """

    commit: Digest
    records: Annotated[int, msgspec.Meta(ge=1, le=2**32 - 1)]
    drafting: Literal["off", "model"]
    drafted: Count
    accepted: Count
    passes: Count
    cached_prompt_tokens: Count
    kv_policy: KvPolicy
    activations: Activations | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    """What it took. ``joules`` is "unavailable" where nothing measures them."""

    started_unix_ms: UnixMilliseconds
    finished_unix_ms: UnixMilliseconds
    joules: Annotated[float, msgspec.Meta(ge=0)] | Literal["unavailable"]


@dataclass(frozen=True, slots=True)
class Trace:
    """The W3C trace context of the request at its provider: its trace, the router's span in it, and whether all of it
    is kept.
    """

    id: Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
    span: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]
    sampled: bool


@dataclass(frozen=True, slots=True)
class Receipt:
    """The whole payload. ``trace``: None where nothing was traced."""

    request_id: RequestId
    model: Model
    request: Request
    output: Output
    evidence: Evidence
    usage: Usage
    trace: Trace | None = None
    v: Literal[1] = 1


def encode(receipt: Receipt) -> bytes:
    """The payload's bytes."""
    return cbor.dumps(msgspec.to_builtins(receipt, builtin_types=(bytes,)))  # asdict takes ten times as long


def decode(data: bytes) -> Receipt:
    """The receipt that ``data`` encodes.

    Raises:
        Malformed: not exactly what ``encode`` writes for some receipt: other keys, types, bounds or encoding.
    """
    read = cbor.loads(data)
    try:
        receipt = msgspec.convert(read, Receipt, strict=True, builtin_types=(bytes,))
    except msgspec.ValidationError as error:
        raise Malformed("the payload does not fit the receipt schema", cause=error) from error
    if encode(receipt) != data:
        raise Malformed("the payload holds keys or forms of numbers that the receipt schema does not know")
    return receipt
