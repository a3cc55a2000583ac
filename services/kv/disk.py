"""The disk tier: blocks in LMDB, which a killed process leaves whole. For one thread; every byte read is checked.

    b"m" key -> parent, kind, checksum, size, generation, with their XXH3-64
    b"d" key -> generation, data

What does not add up is as good as absent, and so is all when the file itself is damaged: it is a cache.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import lmdb
from xxhash import xxh3_64_digest

from countersign.services.protocol.cache import Stored
from countersign.services.protocol.checksum import CHECKSUM_BYTES, checksum
from countersign.services.protocol.keys import KEY_BYTES
from countersign.services.runtime.errors import FailedPrecondition

GRAIN = 4096
_META = struct.Struct(f"<{KEY_BYTES}s{KEY_BYTES}s{CHECKSUM_BYTES}sQQ")
_GENERATION = struct.Struct("<Q")
# Room for the tree itself, and for pages that a transaction replaces before the old ones are free.
_SLACK = 64 << 20
# Starts in a row that did not get as far as to read the file: then it is thrown away.
_STARTS = 3

_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class Disk:
    """Blocks below ``folder``, at most ``capacity`` bytes of them.

    Raises:
        FailedPrecondition: reason FOLDER_TAKEN: another process has it; FOLDER_UNUSABLE: it cannot be written.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self.capacity = capacity
        self._folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise FailedPrecondition(
                f"blocks cannot be kept in {folder}: {error}",
                reason="FOLDER_UNUSABLE",
                help="make it writable, choose another data_dir, or set kv.disk_bytes=0",
            ) from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            text = f"another process keeps its blocks in {folder}"
            help_ = "stop it, or give this one a data_dir of its own"
            raise FailedPrecondition(text, reason="FOLDER_TAKEN", help=help_) from None
        self._environment = self._open()

    def entries(self) -> list[Stored]:
        """What an earlier process kept, as far as it can be read."""
        found = self._guarded(self._read_entries, list[Stored]())
        (self._folder / "starts").unlink(missing_ok=True)
        return found

    def put(self, blocks: Sequence[tuple[Stored, bytes]]) -> bool:
        """Keeps all of them, or none."""

        def write() -> bool:
            with self._environment.begin(write=True) as transaction:
                for entry, data in blocks:
                    transaction.put(b"d" + entry.key, _GENERATION.pack(entry.generation) + data)
                    transaction.put(b"m" + entry.key, _encode(entry))
            return True

        return self._guarded(write, False)

    def get(self, entry: Stored) -> bytes | None:
        """The block's bytes; None when they are not there or do not have the checksum."""

        def read() -> bytes | None:
            with self._environment.begin() as transaction:
                return transaction.get(b"d" + entry.key)

        data = self._guarded(read, None)
        if data is None or data[: _GENERATION.size] != _GENERATION.pack(entry.generation):
            return None
        block = data[_GENERATION.size :]
        return block if len(block) == entry.size and checksum([block]) == entry.checksum else None

    def drop(self, blocks: Iterable[tuple[bytes, int]]) -> None:
        """Forgets these keys, where they are still of this generation."""

        def write() -> None:
            with self._environment.begin(write=True) as transaction:
                for key, generation in blocks:
                    held = transaction.get(b"d" + key)
                    if held is not None and held[: _GENERATION.size] == _GENERATION.pack(generation):
                        transaction.delete(b"d" + key)
                        transaction.delete(b"m" + key)

        self._guarded(write, None)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Forgets these keys whatever their generation, as at the start."""

        def write() -> None:
            with self._environment.begin(write=True) as transaction:
                for key in keys:
                    transaction.delete(b"d" + key)
                    transaction.delete(b"m" + key)

        self._guarded(write, None)

    def close(self) -> None:
        self._guarded(lambda: self._environment.sync(True), None)
        self._environment.close()
        os.close(self._lock)

    def _open(self) -> lmdb.Environment:
        starts = self._folder / "starts"
        failed = len(starts.read_bytes()) if starts.exists() else 0
        if failed >= _STARTS:
            _log.error("the blocks on disk end every start, beginning anew", extra={"folder": str(self._folder)})
            shutil.rmtree(self._folder / "blocks", ignore_errors=True)
            failed = 0
        starts.write_bytes(b"." * (failed + 1))
        try:
            return self._environment_of(self._folder / "blocks")
        except lmdb.Error as error:
            _log.error("the blocks on disk are damaged, beginning anew", extra={"error": str(error)})
            shutil.rmtree(self._folder / "blocks", ignore_errors=True)
            return self._environment_of(self._folder / "blocks")

    def _environment_of(self, folder: Path) -> lmdb.Environment:
        # Without waiting for the disk: a killed process's writes are safe, checksums find what a power cut tore.
        size = self.capacity + self.capacity // 4 + _SLACK
        return lmdb.open(str(folder), map_size=size, sync=False, metasync=False, lock=False, max_dbs=0)

    def _read_entries(self) -> list[Stored]:
        with self._environment.begin() as transaction, transaction.cursor() as cursor:
            if not cursor.set_range(b"m"):
                return []
            decoded = [_decode(bytes(key)[1:], bytes(value)) for key, value in cursor]
        return [entry for entry in decoded if entry is not None]

    def _guarded(self, work: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return work()
        except lmdb.Error as error:
            _log.warning("the blocks on disk cannot be used now", extra={"error": str(error)})
            return otherwise


def _encode(entry: Stored) -> bytes:
    parent = entry.parent or bytes(KEY_BYTES)
    fields = _META.pack(parent, entry.kind or bytes(KEY_BYTES), entry.checksum, entry.size, entry.generation)
    return fields + xxh3_64_digest(entry.key + fields)


def _decode(key: bytes, value: bytes) -> Stored | None:
    fields, digest = value[: _META.size], value[_META.size :]
    if len(fields) != _META.size or digest != xxh3_64_digest(key + fields):
        return None
    parent, kind, held, size, generation = _META.unpack(fields)
    none = bytes(KEY_BYTES)
    return Stored(key, b"" if parent == none else parent, size, b"" if kind == none else kind, held, generation)
