"""The checksum of a block's bytes: XXH3-128, many GB/s. It finds damage, not malice; keys are SHA-256."""

from __future__ import annotations

from collections.abc import Iterable

from xxhash import xxh3_128

CHECKSUM_BYTES = 16


def checksum(parts: Iterable[bytes | memoryview]) -> bytes:
    """The 16 bytes, big-endian, of the parts one after the other."""
    digest = xxh3_128()
    for part in parts:
        digest.update(part)
    return digest.digest()
