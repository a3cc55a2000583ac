"""All requests that are watched: a monitor and a recording each, the oldest forgotten first."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

from countersign.v1.event_pb2 import ProtocolEvent
from countersign.verify.spec.monitor import Fault, Monitor
from countersign.verify.spec.run import Record, Run

MOST_FAULTS = 100


@dataclass(slots=True)
class Watched:
    """One request. ``faults``: what was found and not told; ``told``: each property once, for one bug shows in many
    steps. ``whole``: all that was said of it came here; of one that was met in its middle, only the log can be judged.
    """

    monitor: Monitor
    records: list[Record] = field(default_factory=list)
    events: list[ProtocolEvent] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    closed_at: float | None = None
    written: bool = False
    whole: bool = True

    @property
    def run(self) -> Run:
        return Run(self.monitor.log.request_id, tuple(self.records), tuple(self.events))

    def news(self) -> list[Fault]:
        """Those whose property was not told yet; they are told now."""
        fresh = {fault.property: fault for fault in self.faults if fault.property not in self.told}
        self.faults.clear()
        self.told |= fresh.keys()
        return list(fresh.values())


class Watch:
    """Requests by id. ``most``: how many are kept."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._requests: OrderedDict[str, Watched] = OrderedDict()
        self._restless: dict[str, Watched] = {}
        self.seen = 0

    def find(self, request_id: str) -> Watched | None:
        return self._requests.get(request_id)

    def request(self, request_id: str) -> Watched:
        """The request, watched from now on if it was not."""
        if request_id not in self._requests:
            self.seen += 1
            self._requests[request_id] = Watched(Monitor(request_id))
            if len(self._requests) > self._most:
                oldest, _ = self._requests.popitem(last=False)
                self._restless.pop(oldest, None)
        self._restless[request_id] = self._requests[request_id]
        return self._requests[request_id]

    def restless(self) -> list[Watched]:
        """Those that something has come for since they were last at rest."""
        return list(self._restless.values())

    def rests(self, watched: Watched) -> None:
        """Nothing of it waits."""
        self._restless.pop(watched.monitor.log.request_id, None)

    def all(self) -> list[Watched]:
        return list(self._requests.values())
