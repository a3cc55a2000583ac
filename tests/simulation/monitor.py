"""The properties of DESIGN.md section 4, from what the stream stored and what clients were told, with none of the code
under test but the decoding of records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

from tests.simulation.compute import END
from tests.simulation.jetstream import COMMIT, RECEIPT, Stored

from countersign.events import FinishReason as ToldReason
from countersign.services.protocol.commit import decode
from countersign.services.runtime.errors import (
    CountersignError,
    DataLoss,
    DeadlineExceeded,
    ResourceExhausted,
    Unavailable,
)
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.sampling_pb2 import FinishReason, Usage
from countersign.verify.errors import VerificationError
from countersign.verify.receipt import Openings, attach, parse, receipt_digest

SAFETY = (
    "Agreement",
    "ExactlyOnce",
    "Fenced",
    "OnlyVerified",
    "ClosedIsFinal",
    "OneReceipt",
    "BilledIsCommitted",
)
WATCHED = frozenset(f"Watched{name}" for name in (*SAFETY, "AppendOnly", "Lawful"))
"""What the sidecar's monitor finds, which rests on what is announced as well."""
ALL = frozenset((*SAFETY, "Liveness", "NoBug", *WATCHED))


class Violated(AssertionError):
    """A property does not hold; begins with its name."""


@dataclass(slots=True)
class Log:
    """One request as its records tell it."""

    opened: Opened | None = None
    epoch: int = 0
    owner: str = ""
    tokens: list[int] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    cancelled: bool = False
    closed: Closed | None = None
    records: int = 0
    digest: bytes = b""


class Monitor:
    """``fail`` is called with a name of ``ALL`` and what is wrong; ``now_ms`` is the time of day."""

    def __init__(
        self, fail: Callable[[str, str], None], note: Callable[[str], None], now_ms: Callable[[], int]
    ) -> None:
        self._fail, self._note, self._now_ms = fail, note, now_ms
        self.logs: dict[str, Log] = {}
        self.receipts: dict[str, list[bytes]] = {}
        self.moves = self.cancels = 0
        self._verdicts: dict[tuple[int, ...], set[int]] = {}

    def verdict(self, prefix: tuple[int, ...], token: int) -> None:
        """A target sampled ``token`` after ``prefix``, prompt included."""
        self._verdicts.setdefault(prefix, set()).add(token)

    def stored(self, message: Stored, who: str) -> None:
        """The stream has a new message, from the process ``who``."""
        if message.subject.startswith(RECEIPT):
            self._note(f"{who}: a receipt is stored as {message.subject} {message.sequence}")
            self.receipts.setdefault(message.subject.removeprefix(RECEIPT), []).append(message.data)
            return
        request = message.subject.removeprefix(COMMIT)
        log = self.logs.setdefault(request, Log())
        _, payload = decode(message.data)
        self._note(f"{who}: {request} {message.sequence} {' '.join(str(payload).split())[:90]}")
        if log.closed is not None:
            self._fail("ClosedIsFinal", f"a record follows Closed in {request}")
        match payload:
            case Opened():
                log.opened = payload
            case Assigned():
                self._assigned(request, log, payload)
            case Extended():
                self._extended(request, log, payload, who)
            case Cancelled():
                log.cancelled = True
                self.cancels += 1
            case Closed():
                self._closed(request, log, payload, who)
        log.records += 1
        log.digest = sha256(message.data).digest()

    def _assigned(self, request: str, log: Log, assigned: Assigned) -> None:
        self.moves += assigned.epoch > 1
        if assigned.epoch != log.epoch + 1:
            self._fail("Fenced", f"{request} goes to {assigned.instance} in epoch {assigned.epoch} after {log.epoch}")
        if log.cancelled:
            self._fail("ClosedIsFinal", f"Assigned follows Cancelled in {request}")
        log.epoch, log.owner = assigned.epoch, assigned.instance

    def _extended(self, request: str, log: Log, extended: Extended, who: str) -> None:
        if log.cancelled:
            self._fail("ClosedIsFinal", f"tokens follow Cancelled in {request}")
        if (extended.epoch, who) != (log.epoch, log.owner):
            self._fail("Fenced", f"{who} extends {request} in epoch {extended.epoch}; {log.owner} has {log.epoch}")
        if extended.base != len(log.tokens):
            self._fail("ExactlyOnce", f"tokens of {request} at {extended.base}, where {len(log.tokens)} are")
        prompt = log.opened.prompt_token_ids if log.opened is not None else ()
        for token in extended.token_ids:
            if token not in self._verdicts.get((*prompt, *log.tokens), ()):
                self._fail("OnlyVerified", f"nobody sampled {token} as output {len(log.tokens)} of {request}")
            log.tokens.append(token)
        log.usage.MergeFrom(
            Usage(
                output_tokens=log.usage.output_tokens + len(extended.token_ids),
                drafted_tokens=log.usage.drafted_tokens + extended.drafted,
                accepted_tokens=log.usage.accepted_tokens + extended.accepted,
                target_passes=log.usage.target_passes + 1,
            )
        )

    def _closed(self, request: str, log: Log, closed: Closed, who: str) -> None:
        log.closed = closed
        log.usage.prompt_tokens = len(log.opened.prompt_token_ids) if log.opened is not None else 0
        if closed.usage != log.usage:
            self._fail("BilledIsCommitted", f"{request} is billed {closed.usage}, its log holds {log.usage}")
        problem = self._end(log, closed, by_target=who.startswith("target"))
        if problem:
            self._fail("ClosedIsFinal", f"{request} closes as {FinishReason.Name(closed.reason)}, but {problem}")
        if bool(closed.receipt_sha256) != who.startswith("target"):
            self._fail("OneReceipt", f"{who} closes {request} with receipt {closed.receipt_sha256.hex()!r}")
        if closed.receipt_sha256:
            problem = self._receipt(request, log, closed)
            if problem:
                self._fail("OneReceipt", f"{request}: {problem}")

    def _end(self, log: Log, closed: Closed, *, by_target: bool) -> str:
        """Why this answer may not end so; empty when it may. A router alone may give up."""
        opened, reason = log.opened or Opened(), closed.reason
        whole = len(log.tokens) == opened.sampling.max_tokens
        ends = bool(log.tokens) and log.tokens[-1] == END
        late = self._now_ms() >= opened.deadline_unix_ms
        allowed = {
            FinishReason.FINISH_REASON_LENGTH: whole,
            FinishReason.FINISH_REASON_STOP: ends,
            FinishReason.FINISH_REASON_DEADLINE: late,
            FinishReason.FINISH_REASON_CANCELLED: log.cancelled,
            FinishReason.FINISH_REASON_ERROR: not by_target,
        }
        if allowed[reason] and log.cancelled == (reason == FinishReason.FINISH_REASON_CANCELLED):
            return ""
        return f"it has {len(log.tokens)} tokens, {whole=} {ends=} {late=} cancelled={log.cancelled}"

    def _receipt(self, request: str, log: Log, closed: Closed) -> str:
        """What is wrong with the receipt of a log that is being closed."""
        opened = log.opened or Opened()
        stored = [each for each in self.receipts.get(request, []) if receipt_digest(each) == closed.receipt_sha256]
        if not stored:
            return "no stored receipt has the digest that closes it"
        try:
            attach(stored[0], Openings(opened.salt_key, tuple(opened.prompt_token_ids), tuple(log.tokens), ()))
        except VerificationError as error:
            return f"the receipt is of other tokens: {error}"
        receipt = parse(stored[0]).receipt
        signed = (receipt.output.finish_reason, receipt.evidence.commit, receipt.evidence.records)
        reason = FinishReason.Name(closed.reason).removeprefix("FINISH_REASON_").lower()
        return "" if signed == (reason, log.digest, log.records) else f"the receipt says {signed[0]} of another log"

    def told(self, request: str, received: Sequence[int]) -> None:
        """All tokens that a client has received of a request so far, in order."""
        tokens = self.logs[request].tokens
        if list(received) != tokens[: len(received)]:
            self._fail("Agreement", f"a client of {request} read {list(received)}, the log says {tokens}")

    def told_error(self, request: str, error: CountersignError) -> None:
        """A client was told of an error; nothing here may be worse than "try again"."""
        passing = isinstance(error, Unavailable | DeadlineExceeded | ResourceExhausted)
        if not passing:
            name = "Agreement" if isinstance(error, DataLoss) else "NoBug"
            self._fail(name, f"a client of {request} is told: {error.reason} {error}")

    def ended(self, request: str, received: Sequence[int]) -> None:
        """No client waits any more."""
        log = self.logs.get(request, Log())
        if log.closed is None:
            self._fail("Liveness", f"{request} is not closed")
        if list(received) != log.tokens:
            self._fail("Agreement", f"the client of {request} has {list(received)}, the log {log.tokens}")

    def finished(self, request: str, received: Sequence[int], reason: ToldReason) -> None:
        """A client was told that its answer is final."""
        log = self.logs[request]
        if log.closed is None or list(received) != log.tokens or reason.value != _name(log.closed):
            self._fail("Agreement", f"a client of {request} has {list(received)} {reason}, the log {log.tokens}")


def _name(closed: Closed) -> str:
    return FinishReason.Name(closed.reason).removeprefix("FINISH_REASON_").lower()
