"""What an audit looks at, drawn in public: which receipts, and which positions of one.

Commit first, sample second. A provider that knew what will be looked at could be honest there and nowhere else. So the
draw depends on a beacon that exists only once the receipts are committed: the log's own signature over a checkpoint
that includes them. Nobody but the log can predict it, and everybody can check the draw afterwards. The log itself can
choose among draws, by when it cuts a checkpoint, or by signing one in secret until it likes what that draws: a log that
the provider keeps draws for itself alone, others need one of their own (docs/adr/0025).

    beacon       SHA-256("countersign/beacon/v1" || u32(size of the checkpoint) || checkpoint || signature)
    seed         SHA-256("countersign/draw/v1" || u8(size of the purpose) || purpose || beacon || receipt digest)
    word i       bytes 8 (i mod 4) .. + 8 of SHA-256(seed || u64(i div 4)), as u64
    selected     word 0 < share 2^64
    positions    the first of 0 .. n - 1 in a random order: for i = 0, 1, ..., t uniform in i .. n - 1; exchange what is
                 at i and at t (Fisher and Yates)

All integers are big-endian; t is i plus a word modulo n - i, words too high for an equal share being passed over. A
client that asks for itself takes 32 random bytes of its own as the beacon, once it has the receipt. Fewer positions are
among more: where the provider has a say in how many it opens, it has none in which.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Iterator
from typing import Literal

DIGEST_SIZE = 32

Purpose = Literal["receipts", "activations", "leaves", "blocks"]
"""Draws for different purposes are independent: whether a receipt is audited tells nothing of where."""

SHARE_LINE = "countersign-share "
"""Begins the line of a checkpoint that states which share of the receipts it covers first is audited."""

_BEACON_DOMAIN = b"countersign/beacon/v1"
_DRAW_DOMAIN = b"countersign/draw/v1"
_WORDS = 1 << 64


def beacon(checkpoint: bytes, signature: bytes) -> bytes:
    """The beacon (32 bytes) of a checkpoint: its signed text and the log's own signature over that, not a witness's."""
    return hashlib.sha256(_BEACON_DOMAIN + struct.pack(">I", len(checkpoint)) + checkpoint + signature).digest()


def selected(beacon: bytes, receipt_digest: bytes, share: float) -> bool:
    """Whether the receipt is among the ``share`` (0 to 1) of receipts that have to be audited.

    Raises:
        ValueError: the share is not within 0 and 1, or a digest has not 32 bytes.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"a share of {share} receipts: it lies between 0 and 1")
    return next(_words(_seed("receipts", beacon, receipt_digest))) < int(share * _WORDS)


def positions(purpose: Purpose, beacon: bytes, receipt_digest: bytes, population: int, count: int) -> tuple[int, ...]:
    """``count`` different ones of 0 .. ``population`` - 1, ascending; all of them where there are no more. Those of a
    smaller count are among those of a larger one.

    Raises:
        ValueError: a number is negative, or a digest has not 32 bytes.
    """
    if population < 0 or count < 0:
        raise ValueError(f"{count} positions of {population}")
    words = _words(_seed(purpose, beacon, receipt_digest))
    drawn: list[int] = []
    moved: dict[int, int] = {}  # what stands where something else stood at first
    for place in range(min(count, population)):
        taken = place + _below(words, population - place)
        drawn.append(moved.get(taken, taken))
        moved[taken] = moved.get(place, place)
    return tuple(sorted(drawn))


def draws_needed(share: float, power: float) -> int:
    """How many of a large number must be drawn so that one of the bad ``share`` is among them with chance ``power``.

    Where a test finds only some of the bad that it looks at, multiply ``share`` by that chance first.

    Raises:
        ValueError: share or power does not lie strictly between 0 and 1.
    """
    if not (0 < share < 1 and 0 < power < 1):
        raise ValueError(f"share {share} and power {power} must lie between 0 and 1")
    return math.ceil(math.log1p(-power) / math.log1p(-share))


def _seed(purpose: str, beacon: bytes, receipt_digest: bytes) -> bytes:
    if len(beacon) != DIGEST_SIZE or len(receipt_digest) != DIGEST_SIZE:
        raise ValueError(f"beacon and receipt digest have {len(beacon)} and {len(receipt_digest)} bytes, not 32 each")
    name = purpose.encode()
    return hashlib.sha256(_DRAW_DOMAIN + bytes([len(name)]) + name + beacon + receipt_digest).digest()


def _words(seed: bytes) -> Iterator[int]:
    for counter in itertools.count():
        yield from struct.unpack(">4Q", hashlib.sha256(seed + struct.pack(">Q", counter)).digest())


def _below(words: Iterator[int], bound: int) -> int:
    """Uniform in 0 .. bound - 1."""
    fair = _WORDS - _WORDS % bound
    return next(word for word in words if word < fair) % bound
