"""A log whose folder was damaged, torn or cut off from power: nothing acknowledged is lost unseen."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from logs import entries, filled, leaves, note_of
from power import Disk

from countersign.verify import merkle
from countersign.verify.errors import LogFolderError, Malformed
from countersign.verify.log import store
from countersign.verify.log.checkpoint import Checkpoint, sign
from countersign.verify.log.store import TileLog
from countersign.verify.testing import signing_key


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
        failing, count = failing + 1 if failing > 0 else 1, 0
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
    disk, published, last = Disk(tmp_path / "disk"), dict[int, bytes](), None
    with disk.watching(), TileLog.open(tmp_path / "disk" / "a" / "log") as log:
        for begin in range(0, 840, 70):
            log.append(entries(begin, begin + 70))
            disk.acknowledged = begin + 70
            if begin % 210 == 0:
                log.publish(note_of(log))
                published[len(disk.moments) - 1] = note_of(log)
    assert len(disk.moments) > 30
    for moment in range(len(disk.moments)):
        left = tmp_path / str(moment)
        acknowledged, last = disk.left(moment, left), published.get(moment, last)
        with TileLog.open(left / "a" / "log") as log:
            assert log.size >= acknowledged
            assert log.root() == merkle.root(leaves(log.size))
            assert [log.entry(index) for index in range(log.size)] == entries(0, log.size)
            assert moment not in published or log.published() == last
            assert last is None or log.published() is not None
        shutil.rmtree(left)
