"""The sidecar's monitors beside a run: on sound code they find nothing, whatever goes wrong around it.

Records come as they are stored, events as they are said, which in a house is before the records that rest on them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tests.simulation.jetstream import COMMIT, Stored

from countersign.services.protocol.errors import BrokenChain
from countersign.v1.event_pb2 import ProtocolEvent, ProtocolEvents
from countersign.verify.spec.monitor import Fault, Monitor
from countersign.verify.spec.run import Record, Run


@dataclass(slots=True)
class Watched:
    monitor: Monitor
    records: list[Record] = field(default_factory=list)
    events: list[ProtocolEvent] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def run(self) -> Run:
        return Run(self.monitor.log.request_id, tuple(self.records), tuple(self.events))


class Watcher:
    """``fail`` is told of each fault: the property that falls, and what was found."""

    def __init__(self, fail: Callable[[str, str], None]) -> None:
        self._fail = fail
        self.requests: dict[str, Watched] = {}
        self.broken: set[str] = set()

    def stored(self, message: Stored) -> None:
        if not message.subject.startswith(COMMIT):
            return
        watched = self._of(message.subject.removeprefix(COMMIT))
        watched.records.append(Record(message.sequence, message.data))
        try:
            faults = watched.monitor.record(message.sequence, message.data, now=0.0)
        except BrokenChain as error:
            faults = [watched.monitor.broken(error)]
        # Who says what a record rests on has said it before: nothing may wait.
        self._found(watched, faults + watched.monitor.overdue(now=1.0, patience=0.5))

    def heard(self, data: bytes) -> None:
        for event in ProtocolEvents.FromString(data).events:
            watched = self._of(event.request_id)
            watched.events.append(event)
            self._found(watched, watched.monitor.event(event))

    def _of(self, request_id: str) -> Watched:
        return self.requests.setdefault(request_id, Watched(Monitor(request_id)))

    def _found(self, watched: Watched, faults: list[Fault]) -> None:
        watched.faults += faults
        for fault in faults:
            self._fail(f"Watched{fault.property}", f"{watched.monitor.log.request_id}: {fault.what}")
