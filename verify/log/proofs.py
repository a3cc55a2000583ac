"""Roots and proofs of a log from its tiles, wherever those come from: a folder, memory, HTTP.

Tiles are believed as they are. Who fetches them from somebody else checks what comes out against a signed root
(``merkle.verify_inclusion``, ``verify_consistency``), which no wrong tile survives.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from countersign.verify import merkle
from countersign.verify.errors import Malformed
from countersign.verify.log.tiles import HEIGHT, MAX_LEAVES, WIDTH, Tile, split_entries, split_hashes, width_of

KEPT_TILES = 256
"""Tiles that a ``TileTree`` remembers with their inner nodes: 10 MB."""


class Nodes:
    """The hashes of one tile, and what they give above, computed when first asked for.

    Whatever a narrower form of the tile can be asked for, this one answers alike: hashes in a log never change.
    """

    def __init__(self, hashes: list[bytes]) -> None:
        self.width = len(hashes)
        self._levels = [hashes]

    def node(self, height: int, index: int) -> bytes:
        """The root of the perfect subtree ``index`` of that height within the tile."""
        while len(self._levels) <= height:
            below = self._levels[-1]
            self._levels.append([merkle.node_hash(*below[at : at + 2]) for at in range(0, len(below) - 1, 2)])
        return self._levels[height][index]


class TileTree:
    """The tree behind the tiles of a log. Sizes are such as the log has or had.

    Args:
        fetch: The bytes of a tile, or None where there is no such tile (any more).
    """

    def __init__(self, fetch: Callable[[Tile], bytes | None]) -> None:
        self._fetch = fetch
        self._kept: OrderedDict[Tile, Nodes] = OrderedDict()  # by the full tile

    def root(self, size: int) -> bytes:
        """The root (32 bytes) over the first ``size`` leaves.

        Raises:
            Malformed: a tile is missing or has another size; so do all methods.
        """
        return self._range(0, size, size)

    def inclusion(self, index: int, size: int) -> list[bytes]:
        """The proof that leaf ``index`` is in the tree of ``size``. Raises IndexError where there is none."""
        return [self._range(begin, end, size) for begin, end in merkle.inclusion_ranges(index, size)]

    def consistency(self, old: int, new: int) -> list[bytes]:
        """The proof that the tree of ``new`` begins with the tree of ``old``. Raises IndexError if it is smaller."""
        return [self._range(begin, end, new) for begin, end in merkle.consistency_ranges(old, new)]

    def leaf(self, index: int, size: int) -> bytes:
        """The leaf hash of an entry of a log of ``size``."""
        return self._node(0, index, size)

    def entry(self, index: int, size: int) -> bytes:
        """An entry of a log of ``size``.

        Raises:
            IndexError: there is no such entry.
            Malformed: its bundle is missing, or cut differently.
        """
        if not 0 <= index < size:
            raise IndexError(f"entry {index} of {size}")
        number, place = divmod(index, WIDTH)
        tile, data = self._fetched(Tile("entries", number, width_of(0, number, size)))
        return split_entries(data, tile.width)[place]

    def _range(self, begin: int, end: int, size: int) -> bytes:
        return merkle.fold([self._node(height, index, size) for height, index in merkle.perfect(begin, end)])

    def _node(self, height: int, index: int, size: int) -> bytes:
        """The root of the perfect subtree ``index`` of that height, from the tile that spans it."""
        if size >= MAX_LEAVES:
            raise Malformed("larger than any log", size=size)
        level, above = divmod(height, HEIGHT)
        number, place = divmod(index << above, WIDTH)
        return self._tile(Tile(level, number, width_of(level, number, size))).node(above, place >> above)

    def _tile(self, tile: Tile) -> Nodes:
        kept = self._kept.get(tile.whole)
        if kept is not None and kept.width >= tile.width:
            self._kept.move_to_end(tile.whole)
            return kept
        found, data = self._fetched(tile)
        nodes = self._kept[tile.whole] = Nodes(split_hashes(data, found.width))
        if len(self._kept) > KEPT_TILES:
            self._kept.popitem(last=False)
        return nodes

    def _fetched(self, tile: Tile) -> tuple[Tile, bytes]:
        """The bytes of a tile, or of the full one where a partial one is gone."""
        for wanted in dict.fromkeys((tile, tile.whole)):
            data = self._fetch(wanted)
            if data is not None:
                return wanted, data
        raise Malformed("a tile that the proof needs is missing", name=tile.path)
