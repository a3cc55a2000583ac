"""Fetches a request's receipt and puts its openings back, from the log that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.subjects import receipt_subject
from countersign.services.runtime.errors import DataLoss, FailedPrecondition, InvalidArgument
from countersign.services.runtime.journal import Journal
from countersign.verify.errors import VerificationError
from countersign.verify.fingerprints import MAX_OPENED
from countersign.verify.logged import opened_fingerprints, openings_of, segments_in
from countersign.verify.receipt import attach, parse, receipt_digest, withheld


@dataclass(frozen=True, slots=True)
class Receipts:
    """Receipts are stored without openings: prompt and output lie in clear in the log only, and only for its time."""

    journal: Journal

    async def stored(self, request_id: str) -> bytes | None:
        """The receipt as it is kept, None when there is none."""
        entry = await self.journal.last(receipt_subject(request_id))
        return None if entry is None else entry.data

    async def _named(self, request_id: str, digest: bytes) -> bytes | None:
        """Of the receipts that were made the one with this digest: mostly the last, and one that was made in vain may
        have come behind it.
        """
        last = await self.stored(request_id)
        if last is not None and receipt_digest(last) == digest:
            return last
        entries = await self.journal.read(receipt_subject(request_id))
        return next((entry.data for entry in entries if receipt_digest(entry.data) == digest), None)

    async def of(self, log: LogState) -> bytes:
        """The receipt that ``log`` was closed with, and what the client may open. Raises DataLoss when it is gone."""
        digest = log.closed.receipt_sha256 if log.closed is not None else b""
        try:
            data = await self._named(log.request_id, digest)
            if data is None:
                raise DataLoss(
                    f"the receipt that closed request {log.request_id} is not in the store", reason="RECEIPT_LOST"
                )
            return attach(data, withheld(parse(data).receipt, openings_of(log)))
        except VerificationError as error:
            raise DataLoss(f"the stored receipt of request {log.request_id} is damaged: {error}") from error

    @staticmethod
    def activations(log: LogState, positions: Sequence[int]) -> bytes:
        """The fingerprints at these positions of a log that was closed with a receipt; see verify/fingerprints.

        Raises:
            InvalidArgument: BAD_POSITIONS: not ascending, too many, or beyond the answer.
            FailedPrecondition: NO_FINGERPRINTS; HIDDEN_TOKENS: what hidden tokens were sampled from is not shown.
        """
        if log.opened is not None and any(part.kind == "hidden" for part in segments_in(log, log.opened)):
            raise FailedPrecondition(
                f"request {log.request_id} has hidden tokens, which clients do not see",
                reason="HIDDEN_TOKENS",
                help="only an auditor to whom the provider opens them can check these activations",
            )
        if not log.fingerprints:
            raise FailedPrecondition(
                f"the target of request {log.request_id} kept no fingerprints",
                reason="NO_FINGERPRINTS",
                help="ask for answers of a target with target.fingerprints above 0",
            )
        last, rising = len(log.fingerprints) - 1, all(a < b for a, b in pairwise(positions))
        if not rising or not 0 < len(positions) <= MAX_OPENED or positions[-1] > last:
            raise InvalidArgument(
                f"these are not 1 to {MAX_OPENED} rising positions from 0 to {last}", reason="BAD_POSITIONS"
            )
        return opened_fingerprints(log, positions)
