"""The auditor's pipeline under any order of deliveries, lost acknowledgements and crashes between any two writes.

Log folder and ledger are real; a crash is an exception right before or after a write, after which all is opened anew
from what is on the disk. A ledger may also fail and be there again: then the same objects catch up and go on.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from requests_done import Entry, done

from countersign.services.auditor.case import Disclosed
from countersign.services.auditor.docket import Docket
from countersign.services.auditor.intake import Intake
from countersign.services.auditor.keys import Keys
from countersign.services.auditor.ledger import Ledger
from countersign.services.auditor.notary import Notary
from countersign.services.protocol.subjects import request_of
from countersign.services.runtime.errors import Unavailable
from countersign.verify import sampling
from countersign.verify.audit import AuditReport, Level, audit
from countersign.verify.log import checkpoint as notes
from countersign.verify.log.store import TileLog
from countersign.verify.receipt import receipt_digest
from countersign.verify.testing import signing_key
from countersign.verify.verdict import Verdict, beacon_of, share_of
from countersign.verify.verdict import verify as verify_verdict

SHARE = 0.6
REQUESTS = [done(f"r{number}") for number in range(14)]
LOGS = {request.request_id: request.records for request in REQUESTS}
FOREIGN = done("foreign", key=signing_key(2)).receipt
STREAM = [*(request.receipt for request in REQUESTS), FOREIGN, b"no receipt"]
WRITES = {"append", "publish", "record", "signed", "decided", "postpone", "refuse"}


class Crash(Exception):
    pass


class Fragile:
    """Passes calls on; the write number ``crash_in`` crashes, half of the time before it is done and half after.

    ``outage``: of the ledger's writes alone; that one fails, and the auditor lives.
    """

    crash_in: int | None = None
    outage = False

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        if name not in WRITES:
            return getattr(self._inner, name)

        def write(*arguments: Any) -> Any:
            self._may_strike()
            result = getattr(self._inner, name)(*arguments)
            self._may_strike()
            return result

        return write

    def _may_strike(self) -> None:
        if Fragile.crash_in is None or (Fragile.outage and not isinstance(self._inner, Ledger)):
            return
        Fragile.crash_in -= 1
        if Fragile.crash_in < 0:
            raise Unavailable("the ledger does not answer") if Fragile.outage else Crash


async def examine(case: Disclosed, levels: Collection[Level] = ()) -> AuditReport:
    """All but the tokens, for which there is no model here."""
    wanted = levels or ("form", "count")
    return audit(case.receipt, trusted_keys=[signing_key().public_key()], reference=None, levels=wanted)


class Pipeline(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.now = 0
        self.delivered: set[int] = set()
        self.acknowledged: set[int] = set()
        self.closed: set[str] = set()
        self.expired: set[str] = set()
        self.notes: dict[int, bytes] = {}
        self.verdicts: dict[int, bytes] = {}
        Fragile.crash_in = None
        self.open()

    def open(self) -> None:
        folder = Path(self.folder.name)
        self.keys = Keys.load(folder / "keys")
        self.log, self.ledger = TileLog.open(folder / "log"), Ledger.open(f"sqlite:///{folder / 'ledger.db'}")
        log, ledger = Fragile(self.log), Fragile(self.ledger)
        trusted = [signing_key().public_key()]
        self.intake = Intake(log, ledger, lambda: trusted, lambda: self.now)  # type: ignore[arg-type]
        self.notary = Notary(log, ledger, self.keys, SHARE)  # type: ignore[arg-type]
        self.docket = Docket(log, ledger, self.keys, self.read, examine, lambda: self.now)  # type: ignore[arg-type]
        self.attempt(self.intake.catch_up, self.notary.catch_up)

    def attempt(self, *steps: Callable[[], object]) -> bool:
        """Whether they got through; if not, it caught up, or everything was opened anew."""
        try:
            for step in steps:
                step()
        except Unavailable:
            Fragile.crash_in = None
            self.attempt(self.intake.catch_up, self.notary.catch_up)  # as the service does
            return False
        except Crash:
            Fragile.crash_in = None
            self.close()
            self.open()
            return False
        return True

    def close(self) -> None:
        self.log.close()
        self.ledger.close()

    async def read(self, subject: str) -> Sequence[Entry]:
        request_id = request_of(subject)
        if request_id in self.expired:
            return []
        records = LOGS[request_id]
        return records if request_id in self.closed else records[:-1]

    @rule(crash_in=st.none() | st.integers(0, 12))
    def may_crash(self, crash_in: int | None) -> None:
        Fragile.crash_in, Fragile.outage = crash_in, False

    @rule(fail_in=st.integers(0, 3))
    def ledger_may_fail(self, fail_in: int) -> None:
        Fragile.crash_in, Fragile.outage = fail_in, True

    @rule(places=st.lists(st.integers(0, len(STREAM) - 1), max_size=6), ack_lost=st.booleans())
    def deliver(self, places: list[int], ack_lost: bool) -> None:
        batch = [STREAM[place] for place in places]
        self.delivered |= set(places)
        if self.attempt(lambda: self.intake.take(batch)) and not ack_lost:
            self.acknowledged |= set(places)

    @rule()
    def sign(self) -> None:
        self.attempt(self.notary.sign)

    @rule(which=st.integers(0, len(REQUESTS) - 1))
    def close_request(self, which: int) -> None:
        self.closed.add(REQUESTS[which].request_id)

    @rule(which=st.integers(0, len(REQUESTS) - 1))
    def expire_request(self, which: int) -> None:
        self.expired.add(REQUESTS[which].request_id)

    @rule(seconds=st.integers(0, 60))
    def audit_one(self, seconds: int) -> None:
        self.now += 1000 * seconds
        self.attempt(lambda: asyncio.run(self.docket.next()))

    @invariant()
    def the_log_and_the_ledger_agree(self) -> None:
        entries = [self.log.entry(index) for index in range(self.log.size)]
        digests = [receipt_digest(entry) for entry in entries]
        assert len(set(digests)) == len(digests), "a receipt stands in the log twice"
        assert [entry.digest for entry in self.ledger.between(0, self.log.size)] == digests
        honest = {request.digest for request in REQUESTS}
        assert set(digests) <= honest, "what no trusted key has signed is in the log"
        for place in self.acknowledged & set(range(len(REQUESTS))):
            assert REQUESTS[place].digest in digests, "an acknowledged receipt is lost"

    @invariant()
    def checkpoints_are_signed_once_and_draw_in_public(self) -> None:
        note = self.log.published()
        last = self.ledger.last_checkpoint()
        assert (None if last is None else last[1]) == note
        if note is None:
            return
        size = notes.verify(note, [self.keys.log_key]).checkpoint.size
        assert self.notes.setdefault(size, note) == note, "two checkpoints of one size"
        drawn = {waiting.digest for waiting in self.all_audits()}
        assert drawn == self.expected(), "another draw than the public one"

    @invariant()
    def a_verdict_stays(self) -> None:
        for decided in self.ledger.verdicts(-1, 1000):
            assert decided.verdict is not None
            assert self.verdicts.setdefault(decided.index, decided.verdict) == decided.verdict
            verdict = self.verified(decided.verdict)
            verdict.was_drawn(self.keys.log_key)
            assert verdict.outcome == decided.outcome
            assert verdict.outcome in (["pass", "inconclusive"] if verdict.request_id in self.expired else ["pass"])

    def verified(self, statement: bytes) -> Verdict:
        return verify_verdict(statement, [self.keys.verdicts.public_key()])

    def all_audits(self) -> list[Any]:
        found = (self.ledger.audit_of(request.digest) for request in REQUESTS)
        return [audit for audit in found if audit is not None]

    def expected(self) -> set[bytes]:
        """The draw as anybody can repeat it from log and checkpoints."""
        drawn, begin = set[bytes](), 0
        for size in sorted(self.notes):
            beacon = beacon_of(self.notes[size], self.keys.log_key)
            share = share_of(notes.parse_note(self.notes[size]).checkpoint)
            digests = (receipt_digest(self.log.entry(index)) for index in range(begin, size))
            drawn |= {digest for digest in digests if sampling.selected(beacon, digest, share)}
            begin = size
        return drawn

    def teardown(self) -> None:
        """What the stream still has comes again; then everything is where it belongs."""
        Fragile.crash_in = None
        self.closed |= set(LOGS)
        self.intake.take([STREAM[place] for place in sorted(self.delivered - self.acknowledged)])
        self.acknowledged = set(self.delivered)
        self.notary.sign()
        self.now += 10**9
        while asyncio.run(self.docket.next()):
            pass
        self.the_log_and_the_ledger_agree()
        self.checkpoints_are_signed_once_and_draw_in_public()
        self.a_verdict_stays()
        assert self.log.size == len(self.delivered & set(range(len(REQUESTS))))
        assert len(self.verdicts) == len(self.expected())
        self.close()
        self.folder.cleanup()


TestPipeline = Pipeline.TestCase
TestPipeline.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
