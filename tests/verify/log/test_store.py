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
from power import Disk

from countersign.verify import merkle
from countersign.verify.errors import LogFolderError, Malformed
from countersign.verify.log import journal, store
from countersign.verify.log.checkpoint import Checkpoint, sign
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.store import TileLog
from countersign.verify.log.tiles import Tile, split_entries, width_of
from countersign.verify.testing import signing_key


def entries(begin: int, end: int) -> list[bytes]:
    return [b"entry %d" % index for index in range(begin, end)]


def leaves(size: int) -> list[bytes]:
    return [merkle.leaf_hash(entry) for entry in entries(0, size)]


def filled(folder: Path, size: int, batch: int = 1000) -> TileLog:
    log = TileLog.open(folder)
    for begin in range(0, size, batch):
        log.append(entries(begin, min(begin + batch, size)))
    return log


def note_of(log: TileLog, size: int | None = None) -> bytes:
    size = log.size if size is None else size
    return sign(Checkpoint("log.test", size, log.root(size)), signing_key())


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


def test_a_torn_tail_of_the_journal_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    """Each length that a crash may leave, zeros beyond it as file systems leave them, and then more appends."""
    with filled(tmp_path / "log", 600, 300) as log:
        whole = log._journal.size
        log.append(entries(600, 605))
        last = log._journal.size
    kept = (tmp_path / "log" / "journal").read_bytes()
    assert len(kept) == last
    for cut in range(whole, last):
        for zeros in {0, last - cut}:
            (tmp_path / "log" / "journal").write_bytes(kept[:cut] + bytes(zeros))
            with TileLog.open(tmp_path / "log") as log:
                assert (log.size, log.root()) == (600, merkle.root(leaves(600)))
            assert (tmp_path / "log" / "journal").stat().st_size == whole
    with TileLog.open(tmp_path / "log") as log:
        log.append(entries(600, 605))
    with TileLog.open(tmp_path / "log") as log:
        assert log.root() == merkle.root(leaves(605))


def test_damage_to_an_acknowledged_batch_is_an_error_and_not_a_shorter_log(tmp_path: Path) -> None:
    with TileLog.open(tmp_path) as log:
        begin = log._journal.size
        log.append(entries(0, 5))
        end = log._journal.size
        log.append(entries(5, 10))
    file = tmp_path / "journal"
    kept = file.read_bytes()
    for position in range(begin + 12, end):
        file.write_bytes(kept[:position] + bytes([kept[position] ^ 1]) + kept[position + 1 :])
        with pytest.raises(LogFolderError, match="damaged"):
            TileLog.open(tmp_path)


def test_a_damaged_head_costs_no_batch_behind_it_where_a_checkpoint_tells(tmp_path: Path) -> None:
    """It looks like a torn tail. What cannot be opened is left as it is, to be repaired."""
    with TileLog.open(tmp_path) as log:
        begin = log._journal.size
        log.append(entries(0, 5))
        log.append(entries(5, 10))
        log.publish(note_of(log))
    file = tmp_path / "journal"
    kept = file.read_bytes()
    for position in range(begin, begin + 12):
        damaged = kept[:position] + bytes([kept[position] ^ 1]) + kept[position + 1 :]
        file.write_bytes(damaged)
        with pytest.raises(LogFolderError, match="never go on"):
            TileLog.open(tmp_path)
        assert file.read_bytes() == damaged


def test_a_log_that_lost_what_a_checkpoint_covers_does_not_open(tmp_path: Path) -> None:
    with filled(tmp_path / "log", 500) as log:
        log.publish(note_of(log, 300))
    with TileLog.open(tmp_path / "log") as log:
        assert log.published() == note_of(log, 300)
    with filled(tmp_path / "shorter", 299), filled(tmp_path / "other", 1) as other:
        other.append([b"another"] * 400)
    for folder in ("shorter", "other"):
        shutil.copy(tmp_path / "log" / "checkpoint", tmp_path / folder / "checkpoint")
        with pytest.raises(LogFolderError, match="never go on"):
            TileLog.open(tmp_path / folder)


def test_only_a_checkpoint_of_this_log_can_be_published(tmp_path: Path) -> None:
    with filled(tmp_path, 10) as log:
        for checkpoint in (Checkpoint("log.test", 10, bytes(32)), Checkpoint("log.test", 11, log.root())):
            with pytest.raises(Malformed, match="not of this log"):
                log.publish(sign(checkpoint, signing_key()))
        with pytest.raises(Malformed):
            log.publish(b"no note")
        assert log.published() is None
        log.publish(note_of(log))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "journal").unlink(),
        lambda folder: (folder / "journal").write_bytes(b""),
        lambda folder: (folder / "journal").write_bytes(b"countersign/log/1\n" + bytes(72)),
        lambda folder: (folder / "tile/0/000").unlink(),
        lambda folder: (folder / "tile/0/001").write_bytes(bytes(8192)),
        lambda folder: (folder / "tile/0/001").write_bytes(b"short"),
        lambda folder: (folder / "checkpoint").write_bytes(b"no note"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object) -> None:
    monkeypatch.setattr(store, "JOURNAL_ENTRIES", 256)
    filled(tmp_path, 700, 100).close()
    assert callable(damage)
    damage(tmp_path)
    with pytest.raises(LogFolderError, match=str(tmp_path)):
        TileLog.open(tmp_path)


def test_a_crash_at_any_write_of_the_disk_loses_nothing_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file system call fails once, in turn, while journals change; the folder is opened again after each."""
    monkeypatch.setattr(store, "JOURNAL_ENTRIES", 300)
    calls = {name: getattr(os, name) for name in ("fsync", "pwrite", "replace", "mkdir", "ftruncate")}
    failing, count = -1, 0

    def watched(name: str, *arguments: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count == failing:
            raise OSError(28, "No space left on device")
        return calls[name](*arguments, **named)

    for name in calls:
        monkeypatch.setattr(os, name, lambda *a, name=name, **n: watched(name, *a, **n))
    undisturbed = 0
    while True:
        failing, count = failing + 2 if failing > 0 else 1, 0
        folder = tmp_path / str(failing)
        acknowledged = _append_until_it_fails(folder)
        broken, failing = failing, -1
        with TileLog.open(folder) as log:
            assert log.size >= acknowledged
            assert log.root() == merkle.root(leaves(log.size))
            assert [log.entry(index) for index in range(log.size)] == entries(0, log.size)
        shutil.rmtree(folder)
        if acknowledged == 700:
            undisturbed = broken
            break
        failing = broken
    assert undisturbed > 30, "many calls must have failed in between"


def _append_until_it_fails(folder: Path) -> int:
    """How many entries were acknowledged of the 700, and that nothing is after a failure."""
    acknowledged = 0
    try:
        with TileLog.open(folder) as log:
            for begin in range(0, 700, 100):
                try:
                    log.append(entries(begin, begin + 100))
                except LogFolderError:
                    with pytest.raises(LogFolderError, match="failed earlier"):
                        log.append(entries(begin, begin + 100))
                    return acknowledged
                acknowledged = begin + 100
    except LogFolderError:
        return 0
    return acknowledged


def test_a_power_cut_after_any_sync_loses_nothing_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what was synced is left, at every moment while 840 entries go through three journals."""
    monkeypatch.setattr(store, "JOURNAL_ENTRIES", 300)
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")
    with disk.watching(), TileLog.open(tmp_path / "disk" / "a" / "log") as log:
        for begin in range(0, 840, 70):
            log.append(entries(begin, begin + 70))
            disk.acknowledged = begin + 70
            if begin % 210 == 0:
                log.publish(note_of(log))
    assert len(disk.moments) > 30
    for moment in range(len(disk.moments)):
        left = tmp_path / str(moment)
        acknowledged = disk.left(moment, left)
        with TileLog.open(left / "a" / "log") as log:
            assert log.size >= acknowledged
            assert log.root() == merkle.root(leaves(log.size))
            assert [log.entry(index) for index in range(log.size)] == entries(0, log.size)
        shutil.rmtree(left)


def test_the_journal_is_short_and_starts_at_a_full_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "JOURNAL_ENTRIES", 500)
    with filled(tmp_path, 2000, 90) as log:
        assert log._journal.base > 1000
        assert log._journal.base % 256 == 0
    opened = journal.Journal.open(tmp_path / "journal")
    held: list[Sequence[bytes]] = list(opened.replay())
    opened.close()
    assert [entry for batch in held for entry in batch] == entries(opened.base, 2000)
