"""Tells the world what was signed: each statement once in the stream ``CS_AUDITS``, whatever crashes in between."""

from __future__ import annotations

import asyncio

from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.runtime.journal import Journal, WrongSequence

_TIMEOUT_S = 5.0


class Outbox:
    """What the ledger has and the stream may lack. A statement that is there already is not stored again."""

    def __init__(self, journal: Journal, ledger: Ledger, keys: Keys) -> None:
        self._journal = journal
        self._ledger = ledger
        self._keys = keys

    async def publish(self) -> int:
        """All that waits; how much it was.

        Raises:
            Unavailable, DeadlineExceeded: the stream does not take it; it waits on.
        """
        log, auditor = self._keys.log_name, self._keys.auditor_name
        checkpoints = await asyncio.to_thread(self._ledger.unpublished_checkpoints)
        for size, note in checkpoints:
            await self._once(f"cs.v1.checkpoint.{log}.{size}", note)
            await asyncio.to_thread(self._ledger.published_checkpoint, size, note)
        verdicts = await asyncio.to_thread(self._ledger.unpublished_verdicts)
        for audit in verdicts:
            await self._once(f"cs.v1.verdict.{auditor}.{audit.digest.hex()}", audit.verdict or b"")
            await asyncio.to_thread(self._ledger.published_verdict, audit.index)
        conflicts = await asyncio.to_thread(self._ledger.unpublished_conflicts)
        for sha256, evidence in conflicts:
            await self._once(f"cs.v1.equivocation.{auditor}.{sha256.hex()}", evidence)
            await asyncio.to_thread(self._ledger.published_conflict, sha256)
        return len(checkpoints) + len(verdicts) + len(conflicts)

    async def _once(self, subject: str, data: bytes) -> None:
        """The subject's last message is this one, then."""
        while True:
            last = await self._journal.last(subject)
            if last is not None and last.data == data:
                return
            try:
                expected = 0 if last is None else last.sequence
                await self._journal.append(subject, data, expected=expected, timeout=_TIMEOUT_S)
            except WrongSequence:
                continue  # our own append, whose acknowledgement was lost
            return
