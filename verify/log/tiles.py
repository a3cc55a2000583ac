"""Tiles and entry bundles of a transparency log: their names and bytes (c2sp.org/tlog-tiles).

The tree is cut into tiles 8 levels high. Hash i of tile n at level L is the root over leaves
(256 n + i) 256^L to (256 n + i + 1) 256^L - 1, so level 0 holds the leaf hashes. A tile holds 256 hashes; the
last one of a level may hold fewer. Entries lie in bundles, each of a tile's 256.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from countersign.verify.errors import Malformed
from countersign.verify.merkle import HASH_SIZE

WIDTH = 256
HEIGHT = 8
LEVELS = 8
"""Levels of tiles that a log of fewer than 2^63 leaves can have."""

MAX_LEAVES = 2**63
MAX_ENTRY_BYTES = 2**16 - 1
MAX_PATH_BYTES = 64

_PATH = re.compile(r"tile/(entries|[0-7])/((?:x\d{3}/)*\d{3})(?:\.p/([1-9]\d{0,2}))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Tile:
    """One tile, or one bundle (``level`` "entries"), of ``width`` hashes or entries."""

    level: int | Literal["entries"]
    index: int
    width: int = WIDTH

    @property
    def path(self) -> str:
        """Its name below the log's prefix, such as "tile/0/x001/x234/067.p/8"."""
        groups = [f"{self.index % 1000:03}"]
        rest = self.index // 1000
        while rest:
            groups.append(f"x{rest % 1000:03}")
            rest //= 1000
        partial = f".p/{self.width}" if self.width < WIDTH else ""
        return f"tile/{self.level}/{'/'.join(reversed(groups))}{partial}"

    @property
    def whole(self) -> Tile:
        """The same tile once it is full."""
        return Tile(self.level, self.index)

    @staticmethod
    def parse(path: str) -> Tile:
        """The tile of that name.

        Raises:
            Malformed: no tile is called that.
        """
        found = _PATH.fullmatch(path) if len(path) <= MAX_PATH_BYTES else None
        if found is not None:
            level, index, width = found[1], int(found[2].replace("/", "").replace("x", "")), int(found[3] or WIDTH)
            tile = Tile("entries" if level == "entries" else int(level), index, width)
            if index < MAX_LEAVES // WIDTH and tile.path == path:
                return tile
        raise Malformed("no tile or bundle has this name", name=path)


def width_of(level: int, index: int, size: int) -> int:
    """How many hashes tile ``index`` of a level has in a log of ``size`` leaves; 0 if there is no such tile."""
    return max(0, min(WIDTH, (size >> HEIGHT * level) - index * WIDTH))


def split_hashes(data: bytes, width: int) -> list[bytes]:
    """The hashes of a tile.

    Raises:
        Malformed: not ``width`` hashes.
    """
    if len(data) != width * HASH_SIZE:
        raise Malformed("a tile of another size than it should have", size=len(data), expected=width * HASH_SIZE)
    return [data[start : start + HASH_SIZE] for start in range(0, len(data), HASH_SIZE)]


def pack_entries(entries: Iterable[bytes]) -> bytes:
    """The bytes of a bundle: each entry after its length as a big-endian u16.

    Raises:
        ValueError: an entry is longer than ``MAX_ENTRY_BYTES``.
    """
    parts: list[bytes] = []
    for entry in entries:
        if len(entry) > MAX_ENTRY_BYTES:
            raise ValueError(f"an entry of {len(entry)} bytes: a log takes at most {MAX_ENTRY_BYTES}")
        parts += (struct.pack(">H", len(entry)), entry)
    return b"".join(parts)


def split_entries(data: bytes, width: int) -> Sequence[bytes]:
    """The entries of a bundle.

    Raises:
        Malformed: not ``width`` entries, exactly.
    """
    entries, position = [], 0
    for _ in range(width):
        body = position + 2
        position = body + int.from_bytes(data[position:body], "big")
        entries.append(data[body:position])
        if body > len(data) or position > len(data):
            raise Malformed("an entry bundle is cut short", size=len(data), entries=width)
    if position != len(data):
        raise Malformed("bytes follow after the last entry of a bundle", extra=len(data) - position)
    return entries
