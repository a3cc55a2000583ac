"""Checks a request while it runs, by the same actions as ``tla/commit/Commit.tla``. Pure: no I/O, no clock.

Give it the log's records, in their order, and the events of its parties, as they come. An event that says it has read
further than the log has come here waits for the log; a record that no event explains waits for the event, since both
travel by themselves: ``overdue`` says which have waited too long.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from countersign.services.protocol import errors
from countersign.services.protocol.commit import LogState, decode, record_digest
from countersign.v1.commit_pb2 import Closed, Extended
from countersign.v1.event_pb2 import Delivered, ProtocolEvent, ReceiptMade, Sampled
from countersign.v1.sampling_pb2 import FINISH_REASON_CANCELLED

PROPERTY_OF = {
    errors.WrongBase: "ExactlyOnce",
    errors.TooManyTokens: "ExactlyOnce",
    errors.WrongEpoch: "Fenced",
    errors.AfterCancelled: "ClosedIsFinal",
    errors.AfterClosed: "ClosedIsFinal",
    errors.WrongBill: "BilledIsCommitted",
    errors.BrokenChain: "AppendOnly",
}
"""The property that falls with a record which may not stand where it stands; Lawful with any other."""

_FIRST = frozenset({"started", "followed"})


@dataclass(frozen=True, slots=True)
class Fault:
    """A step that no action explains: the property that falls, and what happened, for people."""

    property: str
    what: str


@dataclass(slots=True)
class _Session:
    """A party that samples: the passes that are not in the log yet, each with its base, and where the next begins."""

    epoch: int
    end: int
    pending: deque[tuple[int, tuple[int, ...]]] = field(default_factory=deque)
    receipts: set[bool] = field(default_factory=set)  # cancelled or not


@dataclass(frozen=True, slots=True)
class _Unexplained:
    since: float
    sequence: int
    payload: Extended | Closed


class Monitor:
    """One request. ``log`` is the state of its log; read on after its sequence where ``BrokenChain`` says so."""

    def __init__(self, request_id: str) -> None:
        self.log = LogState(request_id)
        # Of each record its sequence, and the number of tokens up to it.
        self._places, self._lengths = [0], [0]
        self._cancelled_at = 0
        self._closed_at = 0
        self._numbers: dict[str, int] = {}
        self._known: dict[str, int] = {}
        self._sessions: dict[str, _Session] = {}
        self._streams: dict[str, int] = {}
        self._receipts: dict[bytes, ReceiptMade] = {}
        self._early: dict[str, dict[int, ProtocolEvent]] = {}
        self._unexplained: list[_Unexplained] = []

    @property
    def settled(self) -> bool:
        """Nothing waits for anything."""
        return not self._unexplained and not any(self._early.values())

    def record(self, sequence: int, data: bytes, now: float) -> list[Fault]:
        """The log's next record; one that is known is skipped.

        Raises:
            BrokenChain: records are missing before it, or it follows none: read the log, and tell ``broken`` if it does
                not help.
        """
        if sequence <= self.log.sequence:
            return []
        try:
            stored, payload = decode(data)
            after = self.log.follow(sequence, stored, payload, record_digest(data))
        except errors.BrokenChain:
            raise
        except errors.LogError as error:
            return [Fault(PROPERTY_OF.get(type(error), "Lawful"), f"record {sequence} may not stand there: {error}")]
        self.log = after
        self._places.append(sequence)
        self._lengths.append(len(after.tokens))
        if after.cancelled is not None and not self._cancelled_at:
            self._cancelled_at = sequence
        if isinstance(payload, Closed):
            self._closed_at = sequence
        if isinstance(payload, Extended) or (isinstance(payload, Closed) and payload.receipt_sha256):
            self._unexplained.append(_Unexplained(now, sequence, payload))
        faults = self._late()
        self._explain()
        return faults

    def broken(self, error: errors.BrokenChain) -> Fault:
        """The log itself, read anew, does not hang together."""
        return Fault(PROPERTY_OF[type(error)], str(error))

    def event(self, event: ProtocolEvent) -> list[Fault]:
        """What a party says."""
        party, waits = event.party, event.known > self.log.sequence
        if waits or event.number != self._numbers.get(party, 0) + 1:
            self._early.setdefault(party, {})[event.number] = event
            return []
        faults = list(self._take(event))
        if party in self._early:
            faults += self._late()
        self._explain()
        return faults

    def overdue(self, now: float, patience: float) -> list[Fault]:
        """What still waits after so many seconds. Each is told once."""
        late = [one for one in self._unexplained if now - one.since > patience]
        self._unexplained = [one for one in self._unexplained if now - one.since <= patience]
        return [_fault(one) for one in late]

    def _late(self) -> list[Fault]:
        """Take in what came before its turn, as far as it has it now."""
        if not self._early:
            return []
        faults = [fault for event in self._ready() for fault in self._take(event)]
        self._early = {party: waiting for party, waiting in self._early.items() if waiting}
        return faults

    def _ready(self) -> Iterator[ProtocolEvent]:
        """Events whose turn it is: their party's next, and of a log that has come this far."""
        for party, waiting in self._early.items():
            while (event := waiting.get(self._numbers.get(party, 0) + 1)) and event.known <= self.log.sequence:
                del waiting[event.number]
                yield event

    def _explain(self) -> None:
        if self._unexplained:
            self._unexplained = [one for one in self._unexplained if not self._explained(one.payload)]

    def _take(self, event: ProtocolEvent) -> Iterator[Fault]:
        kind, party, number, known = event.WhichOneof("event"), event.party, event.number, event.known
        before = self._known.get(party, 0)
        if (kind in _FIRST) != (number == 1) or known < before:
            # What it says from here on cannot be understood.
            self._numbers[party] = 0
            self._early.get(party, {}).clear()
            yield Fault("Lawful", f"{party} says {kind} as its event {number}, having read {before}")
            return
        self._numbers[party], self._known[party] = number, known
        match kind:
            case "started":
                self._sessions[event.party] = _Session(event.started.epoch, self._tokens(event.known))
            case "sampled":
                yield from self._sampled(event, event.sampled)
            case "receipt_made":
                yield from self._made(event, event.receipt_made)
            case "followed":
                self._streams[event.party] = event.followed.position
                if event.followed.position > self._tokens(event.known):
                    yield Fault("Agreement", f"{event.party} serves from a position that is not committed")
            case "delivered":
                yield from self._delivered(event, event.delivered)
            case "finished":
                has = {self._streams[event.party], event.finished.position}
                if not 0 < self._closed_at <= event.known or has != {len(self.log.tokens)}:
                    yield Fault("Agreement", f"{event.party} told its client that it has all, and it has not")

    def _sampled(self, event: ProtocolEvent, sampled: Sampled) -> Iterator[Fault]:
        session = self._sessions[event.party]
        if sampled.base != session.end or sampled.epoch != session.epoch:
            yield Fault("OnlyVerified", f"{event.party} sampled at {sampled.base} and not at {session.end}")
        elif 0 < self._closed_at <= event.known or 0 < self._cancelled_at <= event.known:
            yield Fault("ClosedIsFinal", f"{event.party} sampled though it knew that the request had ended")
        session.end = sampled.base + len(sampled.token_ids)
        session.pending.append((sampled.base, tuple(sampled.token_ids)))

    def _made(self, event: ProtocolEvent, made: ReceiptMade) -> Iterator[Fault]:
        self._receipts[made.receipt_sha256] = made
        if made.tokens != self._tokens(event.known):
            yield Fault("OneReceipt", f"{event.party} made a receipt over {made.tokens} tokens, not over the log")
        session = self._sessions[event.party]
        left = [base for base, _ in session.pending if base >= self._tokens(event.known)]
        if left and not made.cancelled:
            yield Fault("ClosedIsFinal", f"{event.party} made a receipt without what it sampled from {left[0]} on")
        if made.cancelled in session.receipts:
            yield Fault("OneReceipt", f"{event.party} made a receipt twice")
        session.receipts.add(made.cancelled)

    def _delivered(self, event: ProtocolEvent, sent: Delivered) -> Iterator[Fault]:
        end = sent.position + len(sent.token_ids)
        if sent.position != self._streams[event.party]:
            what = f"sent tokens from {sent.position} on to a client that has {self._streams[event.party]}"
            yield Fault("Agreement", f"{event.party} {what}")
        elif end > self._tokens(event.known) or self.log.tokens.ids(sent.position)[: end - sent.position] != tuple(
            sent.token_ids
        ):
            yield Fault("Agreement", f"{event.party} sent tokens {sent.position} to {end} that are not committed so")
        self._streams[event.party] = end

    def _explained(self, payload: Extended | Closed) -> bool:
        """Whether by now an event goes with the record."""
        if isinstance(payload, Extended):
            return self._sampled_by_some(payload)
        made = self._receipts.get(payload.receipt_sha256)
        cancelled = payload.reason == FINISH_REASON_CANCELLED
        return made is not None and made.tokens == len(self.log.tokens) and made.cancelled == cancelled

    def _sampled_by_some(self, extended: Extended) -> bool:
        """Two processes that both take an epoch for theirs sample the same: whose record it is cannot be told."""
        wanted = extended.base, tuple(extended.token_ids)
        for session in self._sessions.values():
            if session.epoch != extended.epoch:
                continue
            while session.pending and session.pending[0][0] < extended.base:
                session.pending.popleft()
            if session.pending and session.pending[0] == wanted:
                session.pending.popleft()
                return True
        return False

    def _tokens(self, known: int) -> int:
        """How many tokens the log held up to that sequence."""
        return self._lengths[bisect_right(self._places, known) - 1]


def _fault(one: _Unexplained) -> Fault:
    if isinstance(one.payload, Extended):
        return Fault("OnlyVerified", f"record {one.sequence} commits tokens that no target said it had sampled")
    return Fault("OneReceipt", f"record {one.sequence} names a receipt that was not made over this log")
