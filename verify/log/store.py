"""A log in a folder, which a crash cannot harm.

    lock               one process at a time
    journal            what was appended since the tiles were last made durable (``journal``)
    tile/...           full tiles and bundles, in the layout of c2sp.org/tlog-tiles
    checkpoint         the signed checkpoint published last, if any

An append is acknowledged when its batch is in the journal, on the disk. Tiles follow from entries, so whatever tile a
crash leaves out or half written is written again from the journal at the next opening. When the journal has grown,
the tiles are made durable and a new journal begins at the last full bundle.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from countersign.verify import merkle
from countersign.verify.errors import LogFolderError, Malformed
from countersign.verify.log.checkpoint import parse_note
from countersign.verify.log.journal import Journal, sync_folder
from countersign.verify.log.proofs import TileTree
from countersign.verify.log.tiles import LEVELS, WIDTH, Tile, pack_entries, split_hashes, width_of

JOURNAL_ENTRIES = 16_384
JOURNAL_BYTES = 32 * 1024 * 1024
"""When the journal holds more than either, the tiles are made durable and a new one begins."""


class TileLog:
    """An open log. Safe to use from several threads: appends take turns, and reads do not wait for the disk.

    Every method that appends, publishes or reads raises LogFolderError where the folder cannot be used. After a failed
    append it is not known whether the entries were stored: open the log again and look.
    """

    def __init__(self, folder: Path, lock: int, journal: Journal) -> None:
        self.folder = folder
        self._lock = lock
        self._journal = journal
        self._writing = threading.Lock()
        self._state = threading.RLock()
        self._size = journal.base
        self._hashes: list[list[bytes]] = [[] for _ in range(LEVELS)]  # of the last tile of each level, not full
        self._entries: list[bytes] = []  # of the last bundle, not full
        self._unsynced: list[Path] = []
        self._tree = TileTree(self._read)
        self._failed = self._closed = False

    @staticmethod
    def open(folder: Path) -> TileLog:
        """The log in ``folder``, made if there is none, with every entry that was ever acknowledged.

        Raises:
            LogFolderError: the folder cannot be used, another process has it open, or it is damaged.
        """
        with _usable(folder):
            _make_durable_folder(folder)
            lock = _locked(folder)
            try:
                log = TileLog(folder, lock, _journal_of(folder))
            except BaseException:
                os.close(lock)
                raise
            try:
                log._recover()
            except BaseException:
                log.close()
                raise
            return log

    @property
    def size(self) -> int:
        """The number of entries."""
        return self._size

    def append(self, entries: Sequence[bytes]) -> range:
        """Appends all of the entries or none, and returns their indices; they are durable then.

        Raises:
            LogFolderError: the disk failed; whether they were stored shows when the log is opened again.
            ValueError: an entry has more than 65,535 bytes, or all have more than 64 MiB; nothing was stored.
        """
        with self._writing, self._writes():
            first = self._size
            if entries:
                self._journal.append(entries)
                with self._state:
                    self._grow(entries)
            if self._size - self._journal.base > JOURNAL_ENTRIES or self._journal.size > JOURNAL_BYTES:
                self._begin_journal()
            return range(first, self._size)

    def root(self, size: int | None = None) -> bytes:
        """The root (32 bytes) over the first ``size`` entries, by default over all.

        Raises:
            IndexError: there are fewer; so do all methods that take an index or a size.
        """
        with self._reads():
            return self._tree.root(self._checked(size))

    def inclusion(self, index: int, size: int | None = None) -> list[bytes]:
        """The proof that entry ``index`` is in the tree of ``size`` (``merkle.verify_inclusion``)."""
        with self._reads():
            return self._tree.inclusion(index, self._checked(size))

    def consistency(self, old: int, new: int | None = None) -> list[bytes]:
        """The proof that the tree of ``new`` begins with that of ``old`` (``merkle.verify_consistency``)."""
        with self._reads():
            return self._tree.consistency(old, self._checked(new))

    def entry(self, index: int) -> bytes:
        """The bytes of an entry."""
        with self._reads():
            return self._tree.entry(index, self._size)

    def tile(self, path: str) -> bytes:
        """The bytes of a tile or bundle by its name, full or partial: what a server answers (c2sp.org/tlog-tiles).

        Raises:
            Malformed: no tile is called that.
            IndexError: the log does not reach so far.
        """
        tile = Tile.parse(path)
        with self._reads():
            data = self._read(tile)
        if data is None:
            raise IndexError(f"{path}: the log has {self._size} entries")
        return data

    def publish(self, note: bytes) -> None:
        """Keeps a signed checkpoint of this log as the one published last; from then on the log cannot lose what it
        covers without noticing when it is opened.

        Raises:
            Malformed: it is no checkpoint, or not of this log.
        """
        checkpoint = parse_note(note).checkpoint
        if checkpoint.size > self._size or self.root(checkpoint.size) != checkpoint.root:
            raise Malformed("the checkpoint is not of this log", size=checkpoint.size, root=checkpoint.root)
        with self._writing, self._writes():
            fresh = self._checkpoint.with_suffix(".new")
            _write(fresh, note, sync=True)
            fresh.replace(self._checkpoint)
            sync_folder(self.folder)

    def published(self) -> bytes | None:
        """The signed checkpoint published last."""
        with _usable(self.folder):
            return self._checkpoint.read_bytes() if self._checkpoint.exists() else None

    def close(self) -> None:
        """Lets others open the folder, once an append in another thread is through. What was acknowledged is durable
        already.
        """
        with self._writing:
            if not self._closed:
                self._closed = True
                self._journal.close()
                os.close(self._lock)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint"

    def _checked(self, size: int | None) -> int:
        if size is None:
            return self._size
        if not 0 <= size <= self._size:
            raise IndexError(f"a tree of {size} in a log of {self._size} entries")
        return size

    def _recover(self) -> None:
        """From tiles up to the journal's base, from the journal on, and then no less than was published."""
        for level in range(1, LEVELS):
            number, width = divmod(self._size >> 8 * level, WIDTH)
            below = (Tile(level - 1, number * WIDTH + place) for place in range(width))
            self._hashes[level] = [merkle.root(split_hashes(self._full(tile), WIDTH)) for tile in below]
        if self._tree.root(self._size) != self._journal.base_root:
            raise LogFolderError(f"{self.folder}: the tiles are not those written; restore the folder from a copy")
        for entries in self._journal.replay():
            self._grow(entries)
        self._no_less_than_published()
        self._journal.cut()

    def _no_less_than_published(self) -> None:
        """Before anything is cut off the journal: where this fails, what lies there is needed to repair it."""
        note = self.published()
        if note is None:
            return
        checkpoint = parse_note(note).checkpoint
        if checkpoint.size > self._size or self._tree.root(checkpoint.size) != checkpoint.root:
            raise LogFolderError(
                f"{self.folder}: a checkpoint over {checkpoint.size} entries was published, and the {self._size} here "
                "do not give it; restore the folder from a copy, never go on with this one"
            )

    def _grow(self, entries: Sequence[bytes]) -> None:
        for entry in entries:
            self._entries.append(entry)
            self._push(0, merkle.leaf_hash(entry))
            self._size += 1
            if len(self._entries) == WIDTH:
                self._store(Tile("entries", self._size // WIDTH - 1), pack_entries(self._entries))
                self._entries = []

    def _push(self, level: int, node: bytes) -> None:
        hashes = self._hashes[level]
        hashes.append(node)
        if len(hashes) == WIDTH:
            self._store(Tile(level, self._size >> 8 * (level + 1)), b"".join(hashes))
            self._hashes[level] = []
            self._push(level + 1, merkle.root(hashes))

    def _store(self, tile: Tile, data: bytes) -> None:
        """Readers see the whole tile or none. It need not be durable before the journal drops its entries."""
        path = self.folder / tile.path
        fresh = path.with_suffix(".new")
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(fresh, data)
        fresh.replace(path)
        self._unsynced.append(path)

    def _begin_journal(self) -> None:
        for path in self._unsynced:
            _sync(path)
        for folder in {ancestor for path in self._unsynced for ancestor in path.parents}:
            if folder.is_relative_to(self.folder):
                sync_folder(folder)
        self._unsynced = []
        base = self._size - len(self._entries)
        with self._state:  # readers compute in the same tree, and remember what they computed
            base_root = self._tree.root(base)
        fresh = Journal.create(self._journal.path, base, base_root, self._entries)
        self._journal.close()
        self._journal = fresh

    def _read(self, tile: Tile) -> bytes | None:
        """The bytes of a tile that the log reaches, from memory or file."""
        level = 0 if tile.level == "entries" else tile.level
        if tile.width > width_of(level, tile.index, self._size):
            return None
        if tile.index < self._size >> 8 * (level + 1):
            data = self._full(tile.whole)
            if tile.width == WIDTH:
                return data
            return _beginning(tile, data)
        if tile.level == "entries":
            return pack_entries(self._entries[: tile.width])
        return b"".join(self._hashes[level][: tile.width])

    def _full(self, tile: Tile) -> bytes:
        try:
            return (self.folder / tile.path).read_bytes()
        except OSError as error:
            raise LogFolderError(
                f"{self.folder / tile.path}: {error.strerror}; restore the folder from a copy"
            ) from error

    @contextmanager
    def _reads(self) -> Iterator[None]:
        with self._state, _usable(self.folder):
            yield

    @contextmanager
    def _writes(self) -> Iterator[None]:
        """No writing after a failure: memory and disk may differ then. Nor after ``close``, when others may write."""
        if self._closed:
            raise LogFolderError(f"{self.folder}: this log is closed; open it again")
        if self._failed:
            raise LogFolderError(f"{self.folder}: a write failed earlier; open the log again")
        with _usable(self.folder):
            try:
                yield
            except ValueError:
                raise  # too large: refused before anything was written
            except BaseException:
                self._failed = True
                raise


@contextmanager
def _usable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise LogFolderError(f"{error.filename or folder}: {error.strerror}") from error
    except Malformed as error:
        raise LogFolderError(f"{folder}: {error}; restore the folder from a copy") from error


def _make_durable_folder(folder: Path) -> None:
    """A folder, with those above it, that a power cut does not take away with all that is in it."""
    fresh = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in fresh:
        sync_folder(path.parent)


def _locked(folder: Path) -> int:
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise LogFolderError(f"{folder}: another process has this log open; stop it, or name another folder") from None
    return descriptor


def _journal_of(folder: Path) -> Journal:
    path = folder / "journal"
    if path.exists():
        return Journal.open(path)
    if (folder / "tile").exists() or (folder / "checkpoint").exists():
        raise LogFolderError(f"{path}: missing beside the tiles of a log; restore the folder from a copy")
    return Journal.create(path, 0, merkle.EMPTY_ROOT, ())


def _beginning(tile: Tile, data: bytes) -> bytes:
    """A partial tile of the full one's bytes."""
    if tile.level != "entries":
        return data[: tile.width * merkle.HASH_SIZE]
    end = 0
    for _ in range(tile.width):
        end += 2 + int.from_bytes(data[end : end + 2], "big")
    return data[:end]


def _write(path: Path, data: bytes, *, sync: bool = False) -> None:
    with path.open("wb") as file:
        file.write(data)
        if sync:
            file.flush()
            os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
