"""Tiles have the names and bytes of c2sp.org/tlog-tiles."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from countersign.verify.errors import Malformed
from countersign.verify.log import tiles
from countersign.verify.log.tiles import Tile

LEVELS = st.integers(0, 7) | st.just("entries")


@pytest.mark.parametrize(
    ("tile", "path"),
    [
        (Tile(0, 1234067), "tile/0/x001/x234/067"),  # the specification's own example
        (Tile(0, 0), "tile/0/000"),
        (Tile(1, 0, 17), "tile/1/000.p/17"),
        (Tile("entries", 1000, 112), "tile/entries/x001/000.p/112"),
    ],
)
def test_a_tile_has_the_name_of_the_specification(tile: Tile, path: str) -> None:
    assert tile.path == path
    assert Tile.parse(path) == tile


@given(st.builds(Tile, LEVELS, st.integers(0, 2**55 - 1), st.integers(1, 256)))
def test_a_name_is_read_back(tile: Tile) -> None:
    assert Tile.parse(tile.path) == tile


@pytest.mark.parametrize(
    "path",
    [
        "tile/0/0",
        "tile/0/1234",
        "tile/0/x000/001",
        "tile/0/001/002",
        "tile/8/000",
        "tile/00/000",
        "tile/0/000.p/0",
        "tile/0/000.p/256",
        "tile/0/000.p/07",
        "tile/0/000.p/",
        "tile/0/000/",
        "tile/0/../../etc/passwd",
        "/tile/0/000",
        "tile/0/000\n",
        "tile/0/\u0660\u0660\u0660",
        "tile/0/" + "x999/" * 6 + "999",
        "tile/0/" + "x001/" * 10**5 + "001",
        "checkpoint",
        "",
    ],
)
def test_another_name_is_refused(path: str) -> None:
    with pytest.raises(Malformed, match="this name"):
        Tile.parse(path)


def test_the_specifications_tree_of_70000_has_these_tiles() -> None:
    widths = {level: [tiles.width_of(level, index, 70_000) for index in range(275)] for level in range(4)}
    assert widths[0] == [256] * 273 + [112, 0]
    assert widths[1][:3] == [256, 17, 0]
    assert widths[2][:2] == [1, 0]
    assert widths[3][0] == 0


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_the_entries_of_a_bundle_are_read_back(entries: list[bytes]) -> None:
    assert tiles.split_entries(tiles.pack_entries(entries), len(entries)) == entries


def test_a_bundle_is_as_the_specification_writes_it() -> None:
    assert tiles.pack_entries([b"ab", b"", b"c" * 258]) == b"\0\2ab" + b"\0\0" + b"\1\2" + b"c" * 258


@pytest.mark.parametrize(("data", "width"), [(b"\0", 1), (b"\0\2a", 1), (b"", 1), (b"\0\1ab", 1), (b"a", 0)])
def test_a_bundle_with_bytes_missing_or_left_over_is_refused(data: bytes, width: int) -> None:
    with pytest.raises(Malformed):
        tiles.split_entries(data, width)


def test_the_largest_entry_fits_and_one_byte_more_does_not() -> None:
    largest = bytes(tiles.MAX_ENTRY_BYTES)
    assert tiles.split_entries(tiles.pack_entries([largest]), 1) == [largest]
    with pytest.raises(ValueError, match="65535"):
        tiles.pack_entries([largest + b"\0"])


def test_a_tile_of_another_size_is_refused() -> None:
    assert tiles.split_hashes(bytes(64), 2) == [bytes(32)] * 2
    for size in (0, 63, 65, 96):
        with pytest.raises(Malformed):
            tiles.split_hashes(bytes(size), 2)
