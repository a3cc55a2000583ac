"""The audits that wait: drawn receipts, oldest first, each audited as soon as its request is closed.

They wait in the ledger, which a restart finds again, and one is in hand at a time: the backlog costs disk, not memory.
A receipt whose token log is gone by then gets a verdict too, inconclusive and with the reason: none is missed unseen.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from countersign.services.auditor.case import Case, Disclosed, Missed, NotYet, case_of
from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Audit, Ledger
from countersign.services.auditor.metering import AuditMeter
from countersign.services.auditor.tracing import request_traceparent
from countersign.services.protocol.commit import Entry
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.errors import CountersignError, DataLoss, ResourceExhausted
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.context import request_context
from countersign.verify.audit import AuditReport, Level
from countersign.verify.log.store import TileLog
from countersign.verify.receipt import parse
from countersign.verify.verdict import Finding, Verdict, beacon_of

FIRST_WAIT_MS = 250
LONGEST_WAIT_MS = 30_000
MOST_FAILURES = 5
MOST_LOG_BYTES = 128 * 1024 * 1024
"""Of one request's token log: some 300,000 tokens with fingerprints of the largest size."""

_FORM: tuple[Level, ...] = ("form",)

ReadLog = Callable[[str], Awaitable[Sequence[Entry]]]

_log = logging.getLogger(__name__)


class Examine(Protocol):
    """The audit itself; without ``levels`` all for which there is what they need."""

    def __call__(self, case: Disclosed, levels: Collection[Level] = ()) -> Awaitable[AuditReport]: ...


@dataclass(frozen=True, slots=True)
class _Drawn:
    """A waiting audit with all that it rests on."""

    audit: Audit
    request_id: str
    receipt: bytes
    checkpoint: bytes


class Docket:
    """Works through the ledger's waiting audits, one by one.

    Args:
        log: where the receipts are.
        ledger: where the audits wait.
        keys: sign verdicts, and tell the log's own signature.
        read: the records under a subject.
        examine: the audit itself.
        wall_ms: the time.
    """

    def __init__(
        self,
        log: TileLog,
        ledger: Ledger,
        keys: Keys,
        read: ReadLog,
        examine: Examine,
        wall_ms: Callable[[], int],
    ) -> None:
        self._log = log
        self._ledger = ledger
        self._keys = keys
        self._read = read
        self._examine = examine
        self._wall_ms = wall_ms
        self._failures: Counter[int] = Counter()
        self._tracer = tracing.tracer()
        self._meter = AuditMeter()

    async def next(self) -> bool:
        """One audit, if one is due; whether there was one.

        Raises:
            Unavailable, DeadlineExceeded: token log or ledger do not answer; the audit waits on.
            FailedPrecondition: reason KEY_FILE_UNUSABLE; the audit waits on.
        """
        drawn = await asyncio.to_thread(self._due)
        if drawn is None:
            return False
        with request_context(drawn.request_id):
            await self._audit(drawn)
        return True

    async def _audit(self, drawn: _Drawn) -> None:
        findings = await self._findings(drawn)
        if findings is not None:
            await asyncio.to_thread(self._decide, drawn, findings)

    async def _findings(self, drawn: _Drawn) -> list[Finding] | None:
        """What the levels say; None where it is too early, or the audit itself failed and is to be tried again."""
        try:
            case = await self._case(drawn)
            return None if isinstance(case, NotYet) else await self._audited(drawn, case)
        except CountersignError:
            raise  # nothing of this audit: it waits until that is mended
        except Exception as error:  # noqa: BLE001  a bug in one audit must neither stop the others nor hide
            self._failures[drawn.audit.index] += 1
            _log.exception("an audit failed", extra={"index": drawn.audit.index})
            if self._failures[drawn.audit.index] < MOST_FAILURES:
                return None
            return [Finding("form", "inconclusive", f"the audit could not be made: {error}")]

    async def _case(self, drawn: _Drawn) -> Case:
        try:
            records = await self._read(commit_subject(drawn.request_id))
        except ResourceExhausted as error:
            return Missed(f"the token log of the request is larger than any: {error.message}")
        beacon = beacon_of(drawn.checkpoint, self._keys.log_key)
        return await asyncio.to_thread(case_of, drawn.receipt, drawn.request_id, records, beacon)

    async def _audited(self, drawn: _Drawn, case: Disclosed | Missed) -> list[Finding]:
        """The audit itself, in the trace of the request."""
        told: dict[str, str | int] = {names.REQUEST_ID: drawn.request_id, names.VERDICT_INDEX: drawn.audit.index}
        with tracing.step(self._tracer, "audit", request_traceparent(drawn.receipt), told) as span:
            began = time.monotonic()
            findings = await self._levels(drawn, case)
            self._meter.audited(time.monotonic() - began)
            outcome = worst(findings)
            span.set_attributes({names.RECEIPT: drawn.audit.digest.hex(), names.VERDICT: outcome})
            if outcome == "fail":
                span.set_attribute(names.KEEP, True)
        return findings

    async def _levels(self, drawn: _Drawn, case: Disclosed | Missed) -> list[Finding]:
        if isinstance(case, Disclosed):
            return _findings_of(await self._examine(case))
        form = _findings_of(await self._examine(Disclosed(drawn.receipt), _FORM))
        return [*form, Finding("count", "inconclusive", case.why)]

    def _due(self) -> _Drawn | None:
        """The next one, due again later from here on: one that kills this process keeps no other waiting."""
        now = self._wall_ms()
        audit = self._ledger.next_audit(now)
        if audit is None:
            return None
        self._ledger.postpone(audit.index, now + wait_ms(audit.attempts))
        entry, checkpoint = self._ledger.find(audit.digest), self._ledger.checkpoint_over(audit.index)
        if entry is None or checkpoint is None:
            raise DataLoss(f"the ledger lacks what receipt {audit.index} was drawn from", reason="LEDGER_MISMATCH")
        return _Drawn(audit, entry.request_id, self._log.entry(audit.index), checkpoint[1])

    def _decide(self, drawn: _Drawn, findings: Sequence[Finding]) -> None:
        outcome, audit = worst(findings), drawn.audit
        verdict = Verdict(
            receipt=audit.digest,
            request_id=drawn.request_id,
            outcome=outcome,
            findings=tuple(findings),
            index=audit.index,
            checkpoint=drawn.checkpoint,
            audited_unix_ms=self._wall_ms(),
        )
        self._ledger.decided(audit.index, outcome, verdict.sign(self._keys.verdicts))
        signed_ms = parse(drawn.receipt).receipt.usage.finished_unix_ms
        self._meter.decided(outcome, findings, (verdict.audited_unix_ms - signed_ms) / 1000)
        self._failures.pop(audit.index, None)
        about = {"outcome": outcome, "summary": findings[-1].summary}
        _log.log(logging.ERROR if outcome == "fail" else logging.INFO, "a receipt is audited", extra=about)


def worst(findings: Sequence[Finding]) -> str:
    """The verdict is the worst of the levels."""
    found = {finding.outcome for finding in findings}
    return next((outcome for outcome in ("fail", "inconclusive", "pass") if outcome in found), "inconclusive")


def wait_ms(attempts: int) -> int:
    """How long until the next look at a request that is still open: twice as long each time, to a limit."""
    return int(min(FIRST_WAIT_MS << min(attempts, 16), LONGEST_WAIT_MS))


def _findings_of(report: AuditReport) -> list[Finding]:
    return [Finding(level.level, level.outcome, level.summary, level.figures) for level in report.levels]
