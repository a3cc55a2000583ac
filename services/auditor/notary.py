"""Checkpoints, and the draw that follows from each.

    signed  ->  in the log folder (durable)  ->  in the ledger, with the receipts that it draws, at once

One size is signed once. A checkpoint that is in the folder and not in the ledger was signed just before a crash: it
counts, and what it draws is drawn then. The share of receipts to be audited is part of the checkpoint's text, so that
anybody can repeat the draw: "countersign-share 0.1" in a line of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger, Logged
from countersign.services.runtime.errors import DataLoss
from countersign.verify import sampling
from countersign.verify.errors import VerificationError
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.checkpoint import Checkpoint
from countersign.verify.log.store import TileLog
from countersign.verify.verdict import SHARE_LINE, beacon_of, share_of


class Notary:
    """Signs for one log. ``share``: of the receipts, 0 to 1."""

    def __init__(self, log: TileLog, ledger: Ledger, keys: Keys, share: float) -> None:
        self._log = log
        self._ledger = ledger
        self._keys = keys
        self._share = share
        self._publishing = threading.Lock()

    def catch_up(self) -> None:
        """Enters the checkpoint that a crash left in the folder alone. To be called after the intake's.

        Raises:
            DataLoss: the checkpoint in the folder is not of this key and origin, or older than the ledger's.
        """
        note, last = self._log.published(), self._ledger.last_checkpoint()
        if note is None:
            if last is not None:
                raise self._lost(f"none is in the folder, and the ledger has one over {last[0]} entries")
            return
        try:
            checkpoint = notes.verify(note, [self._keys.log_key]).checkpoint
        except VerificationError as error:
            raise self._lost(f"it is not of the log {self._keys.origin} and its key: {error}") from error
        size = 0 if last is None else last[0]
        if checkpoint.size < size:
            raise self._lost(f"it is over {checkpoint.size} entries, and the ledger has one over {size}")
        if checkpoint.size > size:
            self._enter(checkpoint, note, size)

    def sign(self) -> bytes | None:
        """A checkpoint over all that the log has, and its draw; None where nothing has come since the last."""
        last = self._ledger.last_checkpoint()
        begin, size = 0 if last is None else last[0], self._log.size
        if size == begin:
            return None
        checkpoint = stated(self._keys.origin, size, self._log.root(size), self._share)
        note = notes.sign(checkpoint, self._keys.log)
        with self._publishing:
            self._log.publish(note)
            self._enter(checkpoint, note, begin)
        return note

    def cosigned(self, size: int, note: bytes) -> None:
        """The checkpoint over ``size`` entries with more signatures; in the folder too while it is the newest."""
        with self._publishing:
            self._ledger.cosigned(size, note)
            newest = self._log.published()  # not the ledger's, which a failure may have left behind
            if newest is not None and notes.parse_note(newest).checkpoint.size == size:
                self._log.publish(note)

    def _enter(self, checkpoint: Checkpoint, note: bytes, begin: int) -> None:
        covered = self._ledger.between(begin, checkpoint.size)
        if len(covered) != checkpoint.size - begin:
            raise DataLoss(
                f"the ledger has {len(covered)} of the entries {begin} to {checkpoint.size - 1}",
                reason="LEDGER_MISMATCH",
            )
        beacon, share = beacon_of(note, self._keys.log_key), share_of(checkpoint)
        self._ledger.signed(checkpoint.size, note, drawn(covered, beacon, share))

    def _lost(self, what: str) -> DataLoss:
        return DataLoss(
            f"the last checkpoint of the log in {self._log.folder} cannot be used: {what}",
            reason="CHECKPOINT_MISMATCH",
            help="restore log folder, keys and ledger from one copy; or begin a new log in a fresh data folder",
        )


def stated(origin: str, size: int, root: bytes, share: float) -> Checkpoint:
    """The checkpoint with the share of receipts to be audited."""
    return Checkpoint(origin, size, root, (f"{SHARE_LINE}{share!r}",))


def drawn(entries: Iterable[Logged], beacon: bytes, share: float) -> list[Logged]:
    """Those that have to be audited (``sampling.selected``)."""
    return [entry for entry in entries if sampling.selected(beacon, entry.digest, share)]
