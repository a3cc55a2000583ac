"""From a recorded run of a request to the trace that TraceCommit.tla explains, or does not.

The trace is in an order in which the run can have happened. The log gives it: a record stands where the stream put it,
an event behind the last record that its process had seen. What a router's client was sent stands at the end, one stream
after another, since nothing depends on it; each says how much of the log its router had read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from google.protobuf.message import Message

from countersign.services.protocol.commit import LogState, Payload, decode
from countersign.services.protocol.errors import LogError
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Extended, Opened
from countersign.v1.event_pb2 import ProtocolEvent
from countersign.v1.sampling_pb2 import FINISH_REASON_CANCELLED
from countersign.verify.spec.explain import Illegal, Line, Trace
from countersign.verify.spec.run import Run
from countersign.verify.spec.values import Value

PROPERTIES = (
    "Agreement",
    "NewExactlyOnce",
    "NewFenced",
    "NewOnlyVerified",
    "NewClosedIsFinal",
    "NewOneReceipt",
    "NewBilledIsCommitted",
)
_ROUTER = "router-"
_FOR_CLIENTS = frozenset({"followed", "delivered", "finished"})


def arrange(run: Run) -> Trace:
    """The trace. TraceData also says the epoch of each session in it.

    Raises:
        Illegal: the log is not one, or an event cannot be placed.
    """
    if not run.records:
        raise Illegal("the run holds no record")
    lines, epochs, longest = _Arranger(run).arrange()
    return Trace("commit", "TraceCommit", lines, {"SessionEpoch": tuple(epochs)}, _configuration(longest))


@dataclass(slots=True)
class _Arranger:
    run: Run
    place: dict[int, int] = field(default_factory=lambda: {0: 0})
    payloads: list[Payload] = field(default_factory=list)
    sessions: dict[str, int] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)
    receipts: set[bytes] = field(default_factory=set)
    owner: Assigned = field(default_factory=Assigned)
    cancelled: bool = False

    def arrange(self) -> tuple[list[Line], list[int], int]:
        self._read_log()
        waiting: dict[int, list[ProtocolEvent]] = defaultdict(list)
        streams: dict[str, list[ProtocolEvent]] = defaultdict(list)
        for event in self._in_order():
            if event.WhichOneof("event") in _FOR_CLIENTS:
                streams[event.party].append(event)
            else:
                waiting[self.place[event.known]].append(event)
        self.receipts = {event.receipt_made.receipt_sha256 for events in waiting.values() for event in events} - {b""}
        trace: list[Line] = []
        for index in range(len(self.payloads) + 1):
            if index > 0:
                trace.append(Line(*self._record(index)))
            trace += [Line(self._said(event), _tell(event)) for event in waiting[index]]
        for events in streams.values():
            trace += [Line(self._sent(event), _tell(event)) for event in events]
        opened = self.payloads[0]
        longest = opened.sampling.max_tokens if isinstance(opened, Opened) else 0
        return trace, [*self.epochs, 0], longest

    def _read_log(self) -> None:
        log = LogState(self.run.request_id)
        for number, record in enumerate(self.run.records, 1):
            try:
                log = log.apply(record.sequence, record.data)
            except LogError as error:
                raise Illegal(f"record {number} (sequence {record.sequence}) may not stand there: {error}") from error
            self.place[record.sequence] = number
            self.payloads.append(decode(record.data)[1])

    def _in_order(self) -> Iterator[ProtocolEvent]:
        """Party by party, each in its own order."""
        parties: dict[str, list[ProtocolEvent]] = defaultdict(list)
        for event in self.run.events:
            parties[event.party].append(event)
        for party in sorted(parties):
            known = 0
            for number, event in enumerate(sorted(parties[party], key=lambda one: one.number), 1):
                if event.number != number:
                    raise Illegal(f"event {number} of {party} is missing, or there twice")
                if event.known not in self.place:
                    raise Illegal(f"{_tell(event)} had read record {event.known}, which the log does not hold")
                if event.known < known:
                    raise Illegal(f"{_tell(event)} had read less than before")
                known = event.known
                yield event

    def _record(self, index: int) -> tuple[dict[Value, Value], str]:
        payload, sequence = self.payloads[index - 1], self.run.records[index - 1].sequence
        told = f"record {index} (sequence {sequence}), {payload.DESCRIPTOR.name}"
        match payload:
            case Opened():
                return {"ev": "Opened"}, told
            case Assigned():
                self.owner = payload
                to = "router" if payload.instance.startswith(_ROUTER) else "target"
                return {"ev": "Assigned", "e": payload.epoch, "to": to}, told
            case Extended():
                toks = tuple(payload.token_ids)
                return {"ev": "Extended", "e": payload.epoch, "base": payload.base, "toks": toks}, told
            case Cancelled():
                self.cancelled = True
                return {"ev": "Cancelled"}, told
            case Closed():
                return self._closed(payload), told

    def _closed(self, closed: Closed) -> dict[Value, Value]:
        if closed.receipt_sha256 and closed.receipt_sha256 not in self.receipts:
            raise Illegal("Closed names a receipt that no target said it had made")
        made = bool(closed.receipt_sha256)
        bill, cancelled = closed.usage.output_tokens, closed.reason == FINISH_REASON_CANCELLED
        if not made and (self.owner.instance.startswith(_ROUTER) or self.cancelled):
            return {"ev": "Orphaned", "bill": bill, "cancelled": cancelled}
        return {"ev": "Closed", "made": made, "bill": bill, "cancelled": cancelled, "s": self._owners()}

    def _said(self, event: ProtocolEvent) -> dict[Value, Value]:
        """What a target said."""
        known = self.place[event.known]
        match event.WhichOneof("event"):
            case "started":
                self.epochs.append(event.started.epoch)
                self.sessions[event.party] = len(self.epochs)
                return {"ev": "Started", "s": len(self.epochs), "known": known}
            case "sampled":
                session = self._session(event.party)
                toks = tuple(event.sampled.token_ids)
                return {"ev": "Sampled", "s": session, "known": known, "base": event.sampled.base, "toks": toks}
            case "receipt_made":
                made = event.receipt_made
                session = self._session(event.party)
                return {"ev": "Receipt", "s": session, "tokens": made.tokens, "cancelled": made.cancelled}
        raise Illegal(f"{_tell(event)} says nothing that is known here")

    def _sent(self, event: ProtocolEvent) -> dict[Value, Value]:
        """What a router sent to a client."""
        at = self.place[event.known]
        if event.WhichOneof("event") == "followed":
            return {"ev": "Followed", "position": event.followed.position, "at": at}
        finished = event.WhichOneof("event") == "finished"
        sent = event.finished if finished else event.delivered
        name = "Finished" if finished else "Delivered"
        return {"ev": name, "position": sent.position, "at": at, "toks": tuple(sent.token_ids)}

    def _session(self, party: str) -> int:
        """Its number; that of one which never starts where the party did not say that it had."""
        return self.sessions.get(party, self._never)

    def _owners(self) -> int:
        """The session that the log belongs to now."""
        mine = f"{self.owner.instance}."
        return max((number for party, number in self.sessions.items() if party.startswith(mine)), default=self._never)

    @property
    def _never(self) -> int:
        return sum(event.WhichOneof("event") == "started" for event in self.run.events) + 1


def _tell(event: ProtocolEvent) -> str:
    kind = event.WhichOneof("event") or "nothing"
    what: Message | None = getattr(event, kind, None)
    shown = " ".join(str(what).split()) if what is not None else ""
    shown = shown if len(shown) < 160 else shown[:157] + "..."
    return f"event {event.number} of {event.party} ({kind} {shown}; it had read up to {event.known})"


def _configuration(longest: int) -> str:
    lines = ["SPECIFICATION TraceSpec", "CONSTANTS", "  Req = {r1}", "  Val = {}"]
    lines += [f"  {name} = {longest or 1}" for name in ("MaxLen", "MaxPass", "MaxPending")]
    lines += ["  MaxEpoch = 1000000", "  MaxResumes = 0", "  Session <- TraceSessions", "  EpochOf <- TraceEpoch"]
    lines += ["CONSTRAINT Progress", *(f"INVARIANT {name}" for name in PROPERTIES)]
    return "\n".join(lines) + "\n"
