"""Logs for tests: entry i says that it is, so that whoever opens the folder knows what must be in it."""

from __future__ import annotations

from pathlib import Path

from countersign.verify import merkle
from countersign.verify.log.checkpoint import Checkpoint, sign
from countersign.verify.log.store import TileLog
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
