"""Counts the books of a block store again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from countersign.services.protocol.cache.blocks import Block, Copy, Pin, Tier
from countersign.services.protocol.errors import CacheCorrupt


def check_blocks(blocks: Mapping[bytes, Block]) -> None:
    """Each block by itself, and with its parent and children.

    Raises:
        CacheCorrupt: the books do not agree, which is a bug.
    """
    for block in blocks.values():
        above = block.above
        if above is not None and (blocks.get(above.key) is not above or block.key not in above.children):
            raise CacheCorrupt("a block without its parent", key=block.key, parent=block.parent)
        if any(blocks[child].above is not block for child in block.children):
            raise CacheCorrupt("a child that names another parent", key=block.key)
        if block.writing is not None and (block.pins or block.copies != [Copy.FILLING, Copy.ABSENT]):
            raise CacheCorrupt("a block being written has no pin and lies in RAM", key=block.key)
        if block.sealed:
            _check_sealed(block, above)
        below = [sum(blocks[key].copies[tier] is not Copy.ABSENT for key in block.children) for tier in Tier]
        if below != block.below:
            raise CacheCorrupt("copies of children are counted wrongly", key=block.key)


def _check_sealed(block: Block, above: Block | None) -> None:
    if Copy.WHOLE not in block.copies:
        raise CacheCorrupt("a sealed block without a copy", key=block.key)
    if above is not None and not above.sealed:
        raise CacheCorrupt("a sealed block below one that is not", key=block.key, parent=block.parent)
    if above is not None and block.copies[Tier.DISK] is Copy.WHOLE is not above.copies[Tier.DISK]:
        raise CacheCorrupt("a block on disk below one that is not", key=block.key, parent=block.parent)


def check_room(rooms: Sequence[int], capacity: Sequence[int], copies: Sequence[tuple[Block, int]]) -> None:
    """``copies``: every block, condemned ones too, and the room of one copy of it.

    Raises:
        CacheCorrupt: room is lost, or taken twice.
    """
    for tier in Tier:
        taken = sum(room for block, room in copies if block.copies[tier] is not Copy.ABSENT)
        if rooms[tier] != taken or taken > capacity[tier]:
            raise CacheCorrupt("bytes are not conserved", tier=tier.name, bytes=rooms[tier], taken=taken)


def check_pins(pins: Mapping[int, Pin], kept: Sequence[Block]) -> None:
    """``kept``: every block, condemned ones too.

    Raises:
        CacheCorrupt: a pin without its block, or the other way round.
    """
    held = Counter(id(block) for pin in pins.values() for block in pin.blocks.values())
    if any(held[id(block)] != block.pins for block in kept):
        raise CacheCorrupt("pins and blocks do not agree", pins=len(pins))
