"""Fetches a request's receipt and puts its openings back, from the log that holds them."""

from __future__ import annotations

from dataclasses import dataclass

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.subjects import receipt_subject
from countersign.services.runtime.errors import DataLoss
from countersign.services.runtime.journal import Journal
from countersign.verify.errors import VerificationError
from countersign.verify.logged import openings_of
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
