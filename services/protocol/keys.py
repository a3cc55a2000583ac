"""Keys of KV blocks: SHA-256 chains that say all that the K and V in a block depend on.

    root key   = SHA-256("countersign/kv/root/v1" 0x00 | len(weights) weights | len(format) format | len(tenant) tenant)
    block key  = SHA-256("countersign/kv/block/v1" 0x00 | parent key (32 bytes) | number of ids | ids)

Lengths, numbers and ids are unsigned 32-bit little-endian; text is UTF-8. Everything of variable length has its length
before it and the two kinds differ in their first bytes, so that no two inputs share an encoding.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from hashlib import sha256

BLOCK_TOKENS = 16
KEY_BYTES = 32

_ROOT_DOMAIN = b"countersign/kv/root/v1\x00"
_BLOCK_DOMAIN = b"countersign/kv/block/v1\x00"


def root_key(weights: bytes, cache_format: str, tenant: str) -> bytes:
    """The 32-byte key that stands before a prompt's first block.

    ``weights`` is the SHA-256 of the target's weights, ``cache_format`` names layout and dtype of a block's bytes.
    Tenants never share a block, since the speed of a hit would tell one what another's prompt was; so a key without a
    tenant does not exist.

    Raises:
        ValueError: ``tenant`` is empty.
    """
    if not tenant:
        raise ValueError("a block key needs a tenant: without one, tenants would share blocks")
    digest = sha256(_ROOT_DOMAIN)
    for part in (weights, cache_format.encode(), tenant.encode()):
        digest.update(struct.pack("<I", len(part)) + part)
    return digest.digest()


def block_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """The 32-byte key of the block that holds ``token_ids`` after the block, or root, named ``parent``.

    Raises:
        ValueError: ``parent`` is not 32 bytes long.
        struct.error: an id is negative or does not fit 32 bits.
    """
    if len(parent) != KEY_BYTES:
        raise ValueError(f"a parent key has {KEY_BYTES} bytes, not {len(parent)}")
    ids = struct.pack(f"<{len(token_ids) + 1}I", len(token_ids), *token_ids)
    return sha256(_BLOCK_DOMAIN + parent + ids).digest()


def chain_keys(root: bytes, token_ids: Sequence[int]) -> list[bytes]:
    """Keys of all full blocks of ``token_ids``, root side first; a last block of fewer than 16 tokens has none."""
    keys, parent = [], root
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        parent = block_key(parent, token_ids[start : start + BLOCK_TOKENS])
        keys.append(parent)
    return keys
