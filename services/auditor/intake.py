"""Receipts into the log: at least once in, exactly once there.

    the stream hands out  ->  judged  ->  appended to the log (durable)  ->  entered in the ledger  ->  acknowledged

A crash between two of these loses nothing: what was not acknowledged comes again, what the ledger has is not appended
again, and what the log has and the ledger lacks is entered when the auditor starts (``catch_up``), before anything new.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from countersign.services.auditor.ledger import PAGE, Ledger, Logged
from countersign.services.runtime.errors import DataLoss
from countersign.verify.errors import Malformed, NotCheckable, VerificationError
from countersign.verify.log.store import TileLog
from countersign.verify.log.tiles import MAX_ENTRY_BYTES
from countersign.verify.receipt import ReceiptVerifier, parse, strip

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Taken:
    """What became of a batch. ``later``: places in it of which nothing can be said yet, they are to come again."""

    logged: int
    known: int
    refused: int
    later: frozenset[int]


class Intake:
    """One writer. ``trusted_keys`` is asked for every batch, so that a key may come later than the first receipts."""

    def __init__(
        self,
        log: TileLog,
        ledger: Ledger,
        trusted_keys: Callable[[], Iterable[Ed25519PublicKey]],
        wall_ms: Callable[[], int],
    ) -> None:
        self._log = log
        self._ledger = ledger
        self._trusted_keys = trusted_keys
        self._wall_ms = wall_ms

    def catch_up(self) -> int:
        """Enters what the log has and the ledger lacks; how many that were. To be called before ``take``.

        Raises:
            DataLoss: the ledger knows entries that the log has not: the log folder is an older copy.
        """
        known, size = self._ledger.size(), self._log.size
        if known > size:
            raise DataLoss(
                f"the ledger knows {known} receipts, the log in {self._log.folder} has {size}: entries are lost",
                reason="LOG_LOST_ENTRIES",
                help="restore the log folder from a copy; never go on with this one, its checkpoints would not fit",
            )
        for begin in range(known, size, PAGE):
            indices = range(begin, min(begin + PAGE, size))
            self._ledger.record(_logged(index, self._log.entry(index)) for index in indices)
        return size - known

    def take(self, batch: Sequence[bytes]) -> Taken:
        """Receipts as the stream has them; on return each is in log and ledger, once, or refused, or ``later``."""
        verifier, now = ReceiptVerifier(self._trusted_keys()), self._wall_ms()
        fresh: dict[bytes, tuple[bytes, str]] = {}
        later: set[int] = set()
        refused = 0
        for place, data in enumerate(batch):
            try:
                digest, entry, request_id = judged(data, verifier)
                fresh.setdefault(digest, (entry, request_id))
            except NotCheckable:
                later.add(place)
            except VerificationError as error:
                refused += 1
                self._ledger.refuse(hashlib.sha256(data).digest(), str(error), now)
                _log.warning("a receipt is refused", extra={"error": str(error)})
        known = self._ledger.known(list(fresh))
        new = [(digest, *taken) for digest, taken in fresh.items() if digest not in known]
        if new:
            indices = self._log.append([entry for _, entry, _ in new])
            named = zip(indices, new, strict=True)
            self._ledger.record(Logged(index, digest, request_id) for index, (digest, _, request_id) in named)
        return Taken(len(new), len(batch) - len(new) - refused - len(later), refused, frozenset(later))


def judged(data: bytes, verifier: ReceiptVerifier) -> tuple[bytes, bytes, str]:
    """Digest, log entry and request of a receipt that may enter the log: of the form, signed by a trusted key.

    Raises:
        NotCheckable: there is no trusted key yet.
        VerificationError: it may not.
    """
    signed, entry = verifier.form(data), strip(data)
    if len(entry) > MAX_ENTRY_BYTES:
        raise Malformed("larger than an entry of a log", size=len(entry), limit=MAX_ENTRY_BYTES)
    return signed.digest, entry, signed.receipt.request_id


def _logged(index: int, entry: bytes) -> Logged:
    signed = parse(entry)
    return Logged(index, signed.digest, signed.receipt.request_id)
