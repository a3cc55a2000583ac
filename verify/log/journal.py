"""The journal of a log folder: what was appended since the tiles were last made durable.

    head    magic || u64 base || root over the first ``base`` leaves || SHA-256 of these
    batch   u32 bytes || u32 entries || CRC-32 of these || SHA-256 of these and the body || body, a bundle's bytes

Integers are big-endian. A batch that a crash cut short is the last one, was never acknowledged, and is dropped when the
journal is opened. One that is damaged although others follow it was acknowledged: that is an error. The CRC tells a
length that can be believed from one of which a crash left half.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from countersign.verify.errors import LogFolderError, Malformed
from countersign.verify.log.tiles import pack_entries, split_entries

MAX_BATCH_BYTES = 64 * 1024 * 1024

_MAGIC = b"countersign/log/1\n"
_DIGEST = 32
_HEAD = len(_MAGIC) + 8 + _DIGEST + _DIGEST
_SIZES = struct.Struct(">III")
_BATCH = struct.Struct(f">{_SIZES.size}s{_DIGEST}s")


@dataclass(slots=True)
class Journal:
    """An open journal; ``size`` is its length in bytes."""

    path: Path
    descriptor: int
    base: int
    base_root: bytes
    size: int

    @staticmethod
    def create(path: Path, base: int, base_root: bytes, entries: Sequence[bytes]) -> Journal:
        """A fresh journal in place of what was there, durable on return. Raises OSError."""
        head = _MAGIC + struct.pack(">Q", base) + base_root
        data = head + hashlib.sha256(head).digest() + (_batch(entries) if entries else b"")
        fresh = path.with_name(path.name + ".new")
        descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
            fresh.replace(path)
            sync_folder(path.parent)
        except OSError:
            os.close(descriptor)
            raise
        return Journal(path, descriptor, base, base_root, len(data))

    @staticmethod
    def open(path: Path) -> Journal:
        """The journal there is, at its head.

        Raises:
            OSError: it cannot be read.
            LogFolderError: it is no journal, or its head was changed.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        head = os.pread(descriptor, _HEAD, 0)
        fields, digest = head[:-_DIGEST], head[-_DIGEST:]
        if not head.startswith(_MAGIC) or hashlib.sha256(fields).digest() != digest:
            os.close(descriptor)
            raise LogFolderError(f"{path}: not the journal of a log, or damaged; restore the folder from a copy")
        base = int.from_bytes(fields[len(_MAGIC) : len(_MAGIC) + 8], "big")
        return Journal(path, descriptor, base, fields[-_DIGEST:], _HEAD)

    def replay(self) -> Iterator[Sequence[bytes]]:
        """The batches, oldest first, up to what a crash left half written (``cut``).

        Raises:
            OSError: it cannot be read.
            LogFolderError: a batch that was acknowledged is damaged: others follow it.
        """
        length = os.fstat(self.descriptor).st_size
        while entries := self._next(length):
            yield entries

    def cut(self) -> None:
        """Cuts off what lies behind the batches that were replayed. Raises OSError."""
        if self.size < os.fstat(self.descriptor).st_size:
            os.ftruncate(self.descriptor, self.size)
            os.fsync(self.descriptor)

    def append(self, entries: Sequence[bytes]) -> None:
        """One more batch, durable on return.

        Raises:
            OSError: it may or may not be on the disk: the journal must be opened again.
            ValueError: an entry or the batch is too large; nothing was written.
        """
        data = _batch(entries)
        _write_all(self.descriptor, data, self.size)
        os.fsync(self.descriptor)
        self.size += len(data)

    def close(self) -> None:
        os.close(self.descriptor)

    def _next(self, length: int) -> Sequence[bytes]:
        """The batch at ``size``, stepped over; none where the whole ones end."""
        head = os.pread(self.descriptor, _BATCH.size, self.size)
        if len(head) < _BATCH.size:
            return ()
        sizes, digest = _BATCH.unpack(head)
        size, count, check = _SIZES.unpack(sizes)
        end = self.size + _BATCH.size + size
        if zlib.crc32(sizes[:8]) != check or end > length:
            return ()
        body = os.pread(self.descriptor, size, self.size + _BATCH.size)
        if hashlib.sha256(sizes + body).digest() != digest:
            if end < length:
                raise LogFolderError(
                    f"{self.path}: damaged at byte {self.size}, before its end; restore the folder from a copy"
                )
            return ()
        self.size = end
        try:
            return split_entries(body, count)
        except Malformed as error:
            raise LogFolderError(f"{self.path}: a batch at byte {self.size} cannot be read: {error}") from error


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _batch(entries: Sequence[bytes]) -> bytes:
    body = pack_entries(entries)
    if len(body) > MAX_BATCH_BYTES:
        raise ValueError(f"a batch of {len(body)} bytes: a log takes at most {MAX_BATCH_BYTES} at once")
    sizes = struct.pack(">II", len(body), len(entries))
    sizes += struct.pack(">I", zlib.crc32(sizes))
    return sizes + hashlib.sha256(sizes + body).digest() + body


def _write_all(descriptor: int, data: bytes, offset: int = 0) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
