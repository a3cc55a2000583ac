"""The books of a block store, without the bytes: who may read, write, move and drop which KV block."""

from countersign.services.protocol.cache.blocks import (
    Block,
    Copy,
    Drop,
    Found,
    Outcome,
    Reserved,
    Stored,
    Tier,
    Transition,
    Writing,
)
from countersign.services.protocol.cache.machine import BlockCache
from countersign.services.protocol.cache.order import Cost, Policy, Recency

__all__ = [
    "Block",
    "BlockCache",
    "Copy",
    "Cost",
    "Drop",
    "Found",
    "Outcome",
    "Policy",
    "Recency",
    "Reserved",
    "Stored",
    "Tier",
    "Transition",
    "Writing",
]
