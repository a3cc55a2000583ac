"""A log in a folder: what was appended is there, whole and provable, whatever happened in between."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from threading import Event

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import entries, filled, leaves

from countersign.verify import merkle
from countersign.verify.errors import LogFolderError, Malformed
from countersign.verify.log import journal, store
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.store import TileLog
from countersign.verify.log.tiles import Tile, split_entries, width_of


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> TileLog:
    """Of 70,000 entries, the specification's example: three levels, all but the first full tiles partial."""
    return filled(tmp_path_factory.mktemp("big"), 70_000, 4096)


BIG_LEAVES = leaves(70_000)


def test_an_append_tells_where_the_entries_are(tmp_path: Path) -> None:
    with TileLog.open(tmp_path) as log:
        assert log.append(entries(0, 3)) == range(3)
        assert log.append([]) == range(3, 3)
        assert log.append(entries(3, 300)) == range(3, 300)
        assert log.size == 300
        assert [log.entry(index) for index in range(300)] == entries(0, 300)


@settings(max_examples=40)
@given(
    batches=st.lists(st.lists(st.binary(max_size=20), max_size=300), max_size=8), reopened=st.sets(st.integers(0, 7))
)
def test_a_log_has_the_roots_and_proofs_of_its_leaves_also_when_opened_again(
    tmp_path_factory: pytest.TempPathFactory, batches: list[list[bytes]], reopened: set[int]
) -> None:
    folder = tmp_path_factory.mktemp("log")
    all_entries: list[bytes] = []
    log = TileLog.open(folder)
    for number, batch in enumerate(batches):
        log.append(batch)
        all_entries += batch
        if number in reopened:
            log.close()
            log = TileLog.open(folder)
        whole = [merkle.leaf_hash(entry) for entry in all_entries]
        assert (log.size, log.root()) == (len(whole), merkle.root(whole))
        for old in {0, len(whole) // 2, len(whole)}:
            assert log.root(old) == merkle.root(whole[:old])
            assert log.consistency(old) == merkle.consistency_path(whole, old)
        for index in {0, len(whole) // 3, len(whole) - 1} if whole else ():
            assert log.inclusion(index) == merkle.inclusion_path(whole, index)
            assert log.entry(index) == all_entries[index]
    log.close()
    shutil.rmtree(folder)


@given(st.integers(1, 70_000), st.data())
@settings(max_examples=25)
def test_every_proof_from_tiles_is_the_one_from_the_leaves(big: TileLog, size: int, data: st.DataObject) -> None:
    index, old = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size))
    root = merkle.root(BIG_LEAVES[:size])
    assert big.root(size) == root
    assert merkle.verify_inclusion(BIG_LEAVES[index], index, size, big.inclusion(index, size), root)
    assert merkle.verify_consistency(old, size, big.root(old), root, big.consistency(old, size))


def test_tiles_are_those_of_the_specification(big: TileLog) -> None:
    assert big.tile("tile/0/272") == b"".join(BIG_LEAVES[272 * 256 : 273 * 256])
    assert big.tile("tile/0/273.p/112") == b"".join(BIG_LEAVES[273 * 256 :])
    assert big.tile("tile/0/003.p/9") == b"".join(BIG_LEAVES[3 * 256 : 3 * 256 + 9])
    assert big.tile("tile/1/001.p/17")[-32:] == merkle.root(BIG_LEAVES[272 * 256 : 273 * 256])
    assert big.tile("tile/2/000.p/1") == merkle.root(BIG_LEAVES[: 256 * 256])
    for path, first, width in (("273.p/112", 273, 112), ("001.p/7", 1, 7), ("x000/000", 0, 0), ("272", 272, 256)):
        if width:
            found = split_entries(big.tile(f"tile/entries/{path}"), width)
            assert found == entries(first * 256, first * 256 + width)
    for path in ("tile/0/273", "tile/0/273.p/113", "tile/1/001", "tile/3/000.p/1", "tile/entries/274.p/1"):
        with pytest.raises(IndexError):
            big.tile(path)
    with pytest.raises(Malformed):
        big.tile("tile/0/../../lock")


def test_a_reader_with_nothing_but_fetched_tiles_gets_the_same_proofs(big: TileLog) -> None:
    """The tiles that a log of 65,000 entries had; partial ones are gone since their tiles are full."""
    asked: list[str] = []

    def fetch(tile: Tile) -> bytes | None:
        asked.append(tile.path)
        level = 0 if tile.level == "entries" else tile.level
        gone = tile.width < width_of(level, tile.index, big.size)
        return None if gone else big.tile(tile.path)

    remote, size = TileTree(fetch), 65_000
    for index in (0, 255, 256, 64_999):
        assert remote.inclusion(index, size) == big.inclusion(index, size)
        assert remote.entry(index, size) == big.entry(index)
        assert remote.leaf(index, size) == BIG_LEAVES[index]
    for old in (0, 1, 256, 64_999, size):
        assert remote.consistency(old, size) == big.consistency(old, size)
    assert remote.root(size) == big.root(size)
    assert "tile/0/253.p/232" in asked
    assert "tile/0/253" in asked
    assert len(asked) < 40, "a proof takes a few tiles, not the log"


def test_what_a_reader_remembers_of_a_tile_grows_with_the_log(big: TileLog) -> None:
    """A wider form of a tile serves for narrower ones, never the other way round."""
    asked: list[str] = []

    def fetch(tile: Tile) -> bytes:
        asked.append(tile.path)
        return big.tile(tile.path)

    remote = TileTree(fetch)
    for size in (7, 200, 100, 256, 255, 256):
        assert remote.root(size) == merkle.root(BIG_LEAVES[:size])
    assert asked == ["tile/0/000.p/7", "tile/0/000.p/200", "tile/1/000.p/1", "tile/0/000.p/255"]


def test_a_missing_or_cut_tile_is_an_error_of_the_verifier(big: TileLog) -> None:
    for answer in (None, b"", bytes(31)):
        with pytest.raises(Malformed):
            TileTree(lambda _, answer=answer: answer).inclusion(5, 300)  # type: ignore[misc]
    with pytest.raises(Malformed):
        TileTree(lambda _: None).root(2**70)
    with pytest.raises(IndexError):
        big.inclusion(70_000)
    with pytest.raises(IndexError):
        big.root(70_001)
    with pytest.raises(IndexError):
        big.entry(70_000)


def test_two_processes_cannot_have_one_log_open(tmp_path: Path) -> None:
    with TileLog.open(tmp_path), pytest.raises(LogFolderError, match="another process"):
        TileLog.open(tmp_path)
    TileLog.open(tmp_path).close()


def test_threads_append_and_read_at_once_and_every_proof_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "JOURNAL_ENTRIES", 500)
    with TileLog.open(tmp_path) as log, ThreadPoolExecutor(6) as pool:

        def write(name: int) -> list[range]:
            batches = [[b"%d %d %d" % (name, turn, place) for place in range(37)] for turn in range(20)]
            return [log.append(batch) for batch in batches]

        def read() -> int:
            checked = 0
            while not done.is_set():
                if (size := log.size) == 0:
                    continue
                index, old, root = size * 2 // 3, size // 2, log.root(size)
                leaf = merkle.leaf_hash(log.entry(index))
                assert merkle.verify_inclusion(leaf, index, size, log.inclusion(index, size), root)
                assert merkle.verify_consistency(old, size, log.root(old), root, log.consistency(old, size))
                checked += 1
            return checked

        done = Event()
        readers = [pool.submit(read) for _ in range(2)]
        writers = [pool.submit(write, name) for name in range(4)]
        try:
            written = [writer.result(timeout=60) for writer in writers]
        finally:
            done.set()
        assert all(reader.result(timeout=60) for reader in readers)
        for name, batches in enumerate(written):
            for turn, indices in enumerate(batches):
                assert [log.entry(index) for index in indices] == [b"%d %d %d" % (name, turn, at) for at in range(37)]
        assert sorted(index for batches in written for indices in batches for index in indices) == [*range(log.size)]


def test_the_tree_is_read_by_one_thread_at_a_time_also_while_a_journal_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that compute the inner nodes of one tile at once leave wrong ones behind, for every later proof and root."""
    with filled(tmp_path, 1000) as log, ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(store, "JOURNAL_ENTRIES", 256)
        real, beside = log._tree.root, list[bool]()

        def root(size: int) -> bytes:
            reader = pool.submit(log.inclusion, 0)
            beside.append(bool(wait([reader], timeout=0.2).done))
            return real(size)

        monkeypatch.setattr(log._tree, "root", root)
        log.append(entries(1000, 1001))
        assert beside == [False]


def test_after_an_append_that_broke_off_half_way_nothing_more_is_appended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journal has the batch, memory a part of it: the next entries would get places that are taken."""
    real, left = merkle.leaf_hash, 3

    def leaf_hash(entry: bytes) -> bytes:
        nonlocal left
        left -= 1
        if left == 0:
            raise MemoryError
        return real(entry)

    with filled(tmp_path, 10) as log:
        with monkeypatch.context() as patched:
            patched.setattr(merkle, "leaf_hash", leaf_hash)
            with pytest.raises(MemoryError):
                log.append(entries(10, 15))
        with pytest.raises(LogFolderError, match="failed earlier"):
            log.append(entries(15, 16))
    with TileLog.open(tmp_path) as log:
        assert [log.entry(index) for index in range(log.size)] == entries(0, 15)


def test_a_log_is_closed_when_the_append_of_another_thread_is_through_and_never_written_to_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the entries would go to whatever file gets the journal's number next."""
    log, syncing, go_on, real = filled(tmp_path, 10), Event(), Event(), os.fsync

    def fsync(descriptor: int) -> None:
        syncing.set()
        assert go_on.wait(10)
        real(descriptor)

    with ThreadPoolExecutor(2) as pool:
        monkeypatch.setattr(os, "fsync", fsync)
        appended = pool.submit(log.append, entries(10, 20))
        assert syncing.wait(10)
        closed = pool.submit(log.close)
        try:
            assert not wait([closed], timeout=0.2).done
        finally:
            go_on.set()
        assert appended.result(10) == range(10, 20)
        closed.result(10)
    with pytest.raises(LogFolderError, match="is closed"):
        log.append(entries(20, 21))
    log.close()
    with TileLog.open(tmp_path) as log:
        assert log.root() == merkle.root(leaves(20))


def test_what_is_too_large_is_refused_and_nothing_of_it_stored(tmp_path: Path) -> None:
    with TileLog.open(tmp_path) as log:
        with pytest.raises(ValueError, match="65535"):
            log.append([b"fits", bytes(65_536)])
        with pytest.raises(ValueError, match="at once"):
            log.append([bytes(65_535)] * 1100)
        assert log.append([b"fits"]) == range(1)


def test_the_journal_is_short_and_starts_at_a_full_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "JOURNAL_ENTRIES", 500)
    with filled(tmp_path, 2000, 90) as log:
        assert log._journal.base > 1000
        assert log._journal.base % 256 == 0
    opened = journal.Journal.open(tmp_path / "journal")
    held: list[Sequence[bytes]] = list(opened.replay())
    opened.close()
    assert [entry for batch in held for entry in batch] == entries(opened.base, 2000)
