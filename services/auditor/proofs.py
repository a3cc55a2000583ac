"""Proofs out of the log, for whoever asks. Blocking; to be called in a thread."""

from __future__ import annotations

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.wire import entry_of
from countersign.services.runtime.errors import FailedPrecondition, InvalidArgument, NotFound
from countersign.v1.auditor_pb2 import (
    AuditState,
    GetConsistencyResponse,
    GetInclusionResponse,
    GetVerdictResponse,
)
from countersign.verify import cose_receipt
from countersign.verify.log.store import TileLog
from countersign.verify.log.tiles import MAX_LEAVES


class Proofs:
    """Answers from log and ledger."""

    def __init__(self, log: TileLog, ledger: Ledger, keys: Keys) -> None:
        self._log = log
        self._ledger = ledger
        self._keys = keys

    def checkpoint(self, covers: int | None = None) -> tuple[int, bytes]:
        """Size and note of the newest checkpoint, or of the first that covers an entry.

        Raises:
            InvalidArgument: reason NO_SUCH_SIZE: no log has such an entry.
            FailedPrecondition: reason NO_CHECKPOINT: there is none, yet.
        """
        if covers is not None and covers >= MAX_LEAVES:
            raise InvalidArgument(f"no log has an entry {covers}", reason="NO_SUCH_SIZE")
        found = self._ledger.last_checkpoint() if covers is None else self._ledger.checkpoint_over(covers)
        if found is None:
            what = "the log" if covers is None else f"entry {covers}"
            raise FailedPrecondition(
                f"no checkpoint covers {what} yet",
                reason="NO_CHECKPOINT",
                help="one follows soon: ask again in a second",
            )
        return found

    def inclusion(self, digest: bytes) -> GetInclusionResponse:
        """The proof that a receipt is under the newest checkpoint.

        Raises:
            NotFound: reason NOT_LOGGED.
            FailedPrecondition: reason NO_CHECKPOINT: it is in the log, and no checkpoint covers it yet.
        """
        entry = self._ledger.find(digest)
        if entry is None:
            raise _not_logged(digest)
        size, note = self.checkpoint()
        if entry.index >= size:
            self.checkpoint(covers=entry.index)
            size, note = self.checkpoint()
        path = self._log.inclusion(entry.index, size)
        proof = cose_receipt.prove_inclusion(self._log.root(size), size, entry.index, path, self._keys.log)
        return GetInclusionResponse(index=entry.index, checkpoint=note, path=path, cose_receipt=proof)

    def consistency(self, old: int, new: int) -> GetConsistencyResponse:
        """The proof between two sizes, the larger 0 for the newest checkpoint's.

        Raises:
            InvalidArgument: reason NO_SUCH_SIZE: the log had not these sizes, in this order.
        """
        newest, _ = self.checkpoint()
        larger = new or newest
        if not 0 <= old <= larger <= newest:
            raise InvalidArgument(
                f"no proof from {old} to {larger}: the newest checkpoint is over {newest}", reason="NO_SUCH_SIZE"
            )
        return GetConsistencyResponse(new_size=larger, path=self._log.consistency(old, larger))

    def verdict(self, digest: bytes) -> GetVerdictResponse:
        """How far the audit of a receipt is.

        Raises:
            NotFound: reason NOT_LOGGED.
        """
        entry = self._ledger.find(digest)
        if entry is None:
            raise _not_logged(digest)
        audit = self._ledger.audit_of(digest)
        if audit is not None and audit.verdict is not None:
            return GetVerdictResponse(state=AuditState.AUDIT_STATE_DECIDED, verdict=entry_of(audit))
        if audit is not None:
            return GetVerdictResponse(state=AuditState.AUDIT_STATE_WAITING)
        covered = self._ledger.checkpoint_over(entry.index) is not None
        state = AuditState.AUDIT_STATE_NOT_DRAWN if covered else AuditState.AUDIT_STATE_LOGGED
        return GetVerdictResponse(state=state)


def _not_logged(digest: bytes) -> NotFound:
    return NotFound(
        f"the log has no receipt {digest.hex()}",
        reason="NOT_LOGGED",
        help="a receipt enters the log a second or so after its answer; is it of this deployment?",
    )
