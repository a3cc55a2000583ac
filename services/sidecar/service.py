"""The sidecar: checks every request of the commit protocol while it runs. It decides nothing and nobody waits for it.

It reads the records that the stream republishes and the events that the parties announce; what it misses of a log it
reads from the stream. What no action of the specification explains is logged as an error, counted, published on
``cs.v1.event.violation``, told in the request's trace, and the request's run stored as evidence.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from nats.aio.msg import Msg

from countersign.files import write_atomically
from countersign.services.protocol.errors import BrokenChain
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.announcer import EVENTS
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.errors import CountersignError, NotFound
from countersign.services.runtime.service import Call, Context
from countersign.services.runtime.telemetry import metrics, tracing
from countersign.services.sidecar.tracing import violated
from countersign.services.sidecar.watch import MOST_FAULTS, Watch, Watched
from countersign.v1 import sidecar_pb2
from countersign.v1.event_pb2 import ProtocolEvents
from countersign.v1.registry_pb2 import Instance
from countersign.v1.sidecar_pb2 import GetRunRequest, GetRunResponse, StatusRequest, StatusResponse, Violation
from countersign.verify.spec.run import Record, write_run

COMMITTED = "cs.v1.committed."
VIOLATIONS = "cs.v1.event.violation"

# Record and event travel by themselves; which waits longer for the other than this lacks it.
PATIENCE_S = 0.5
# What came is looked at together, which costs far less than message by message.
LOOK_S = 0.1
# After a close its clients still get their last tokens.
LINGER_S = 1.0
MOST_WAITING = 65_536
NICENESS = 19


class SidecarService:
    """Watches; ``folder`` takes the evidence, and every run where ``record`` is set."""

    descriptor: ServiceDescriptor = sidecar_pb2.DESCRIPTOR.services_by_name["SidecarService"]

    def __init__(self, context: Context, folder: Path) -> None:
        config = context.config.sidecar
        self._bus, self._journal, self._log = context.bus, context.journal, context.log
        self._folder, self._record = folder, config.record
        self._watch = Watch(config.requests)
        self._arrived_records: list[Msg] = []
        self._arrived_events: list[Msg] = []
        self._lost = 0
        self._now = 0.0
        self._records = self._events = 0
        self._violations: deque[Violation] = deque(maxlen=MOST_FAULTS)
        self._violation_count = 0
        self._dropped = 0
        self._tracer = tracing.tracer()
        self._counter = metrics.counter(metrics.VIOLATIONS)

    @property
    def watched(self) -> int:
        """Requests so far."""
        return self._watch.seen

    async def run(self) -> None:
        """Watch for ever."""
        records = await self._bus.subscribe(f"{COMMITTED}*", self._arrives(self._arrived_records))
        events = await self._bus.subscribe(EVENTS, self._arrives(self._arrived_events))
        try:
            last = time.monotonic()
            while True:
                await asyncio.sleep(LOOK_S)
                last, elapsed = time.monotonic(), time.monotonic() - last
                # Patience must not run out while this process, the last to be served, gets no processor.
                self._now += min(elapsed, LOOK_S)
                await self._look()
        finally:
            await self._bus.unsubscribe(records)
            await self._bus.unsubscribe(events)

    async def close(self) -> None:
        """Nothing is held."""

    def describe(self, instance: Instance) -> None:
        instance.active_requests = sum(watched.closed_at is None for watched in self._watch.restless())

    async def Status(self, request: StatusRequest, call: Call) -> StatusResponse:
        return StatusResponse(
            requests=self._watch.seen,
            records=self._records,
            events=self._events,
            violations=self._violations,
            violation_count=self._violation_count,
        )

    async def GetRun(self, request: GetRunRequest, call: Call) -> GetRunResponse:
        """Raises NotFound for a request that was not seen, or is too old."""
        watched = self._watch.find(request.request_id)
        if watched is None:
            raise NotFound(
                f"request {request.request_id} was not watched, or too long ago",
                reason="UNKNOWN_REQUEST",
                help="set sidecar.record=true to keep every run",
            )
        return GetRunResponse(run=write_run(watched.run))

    def _arrives(self, waiting: list[Msg]) -> Callable[[Msg], Awaitable[None]]:
        async def receive(msg: Msg) -> None:
            if len(waiting) < MOST_WAITING:
                waiting.append(msg)
            else:
                self._lost += 1

        return receive

    async def _look(self) -> None:
        """What has come, what has waited too long, and what is over."""
        self._count_lost()
        # Events first: what a record rests on was sent before it.
        events, records = self._arrived_events[:], self._arrived_records[:]
        self._arrived_events.clear()
        self._arrived_records.clear()
        for msg in events:
            self._said(msg)
        gaps = {watched.monitor.log.request_id: watched for watched in map(self._committed, records) if watched}
        for watched in gaps.values():
            await self._catch_up(watched)
        for watched in self._watch.restless():
            if watched.whole:
                watched.faults += watched.monitor.overdue(self._now, PATIENCE_S)
            await self._report(watched)
            if watched.closed_at is not None and self._now - watched.closed_at > LINGER_S:
                self._watch.rests(watched)
                if self._record and watched.whole and not watched.written:
                    watched.written = True
                    await self._store(watched, "runs")

    def _count_lost(self) -> None:
        if self._bus.dropped + self._lost > self._dropped:
            self._dropped = self._bus.dropped + self._lost
            self._log.warning("messages were dropped: of what is open only the logs are judged")
            for watched in self._watch.restless():
                watched.whole = False

    def _said(self, msg: Msg) -> None:
        """What parties say."""
        try:
            events = ProtocolEvents.FromString(msg.data).events
        except DecodeError:
            self._log.warning("an event cannot be read", extra={"bytes": len(msg.data)})
            return
        for event in events:
            self._events += 1
            watched = self._watch.request(event.request_id)
            watched.events.append(event)
            faults = watched.monitor.event(event)
            if watched.whole:
                watched.faults += faults

    def _committed(self, msg: Msg) -> Watched | None:
        """A record of the stream; its request, where something before it is missing."""
        sequence = int((msg.headers or {}).get("Nats-Sequence", "0"))
        watched = self._watch.request(msg.subject.removeprefix(COMMITTED))
        try:
            self._take(watched, sequence, msg.data)
        except BrokenChain:
            # Of a request that is older than this process nobody repeats what its parties said.
            watched.whole = watched.whole and watched.monitor.log.records > 0
            return watched
        return None

    async def _catch_up(self, watched: Watched) -> None:
        """Read what the subscription missed: the beginning of a request that is older than this process, or a gap."""
        log = watched.monitor.log
        try:
            for entry in await self._journal.read(commit_subject(log.request_id), after=log.sequence):
                self._take(watched, entry.sequence, entry.data)
        except BrokenChain as error:
            watched.faults.append(watched.monitor.broken(error))
        except CountersignError as error:
            self._log.warning("a log cannot be read", extra={"request_id": log.request_id, "reason": error.reason})

    def _take(self, watched: Watched, sequence: int, data: bytes) -> None:
        before = watched.monitor.log.sequence
        watched.faults += watched.monitor.record(sequence, data, self._now)
        if sequence > before:
            self._records += 1
            watched.records.append(Record(sequence, data))
        if watched.monitor.log.closed is not None and watched.closed_at is None:
            watched.closed_at = self._now

    async def _report(self, watched: Watched) -> None:
        for fault in watched.news():
            evidence = await self._store(watched, "violations")
            violation = Violation(
                request_id=watched.monitor.log.request_id,
                property=fault.property,
                what=fault.what,
                found_unix_ms=wall_ms(),
                evidence=evidence,
            )
            self._violations.append(violation)
            self._violation_count += 1
            self._counter.add(1, {metrics.PROPERTY: fault.property})
            violated(self._tracer, watched.monitor.log, violation)
            about = {"request_id": violation.request_id, "property": violation.property, "evidence": evidence}
            self._log.error("the protocol is violated", extra=about | {"what": violation.what})
            try:
                await self._bus.publish(VIOLATIONS, violation.SerializeToString(), {})
            except CountersignError as error:
                self._log.warning("a violation could not be published", extra=about | {"reason": error.reason})

    async def _store(self, watched: Watched, kind: str) -> str:
        """The run's file, below ``folder``; empty when it could not be written."""
        file = self._folder / kind / f"{watched.monitor.log.request_id}.jsonl"
        run = watched.run

        def write() -> None:
            text = write_run(run)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, text.encode())

        try:
            await asyncio.to_thread(write)
        except OSError:
            self._log.exception("a run could not be stored", extra={"file": str(file)})
            return ""
        return str(file)


async def create(context: Context) -> SidecarService:
    """It needs nothing but the bus and a folder, and stands back for those whose work it watches."""
    os.nice(NICENESS)
    service = SidecarService(context, context.config.data_dir)
    metrics.observe(metrics.WATCHED, lambda: service.watched)
    return service
