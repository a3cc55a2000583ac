"""The sidecar: checks every request of the commit protocol while it runs. It decides nothing and nobody waits for it.

It reads the records that the stream republishes and the events that the parties announce; what it misses of a log it
reads from the stream. What no action of the specification explains is logged as an error, counted, published on
``cs.v1.event.violation``, and the request's run stored as evidence.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from pathlib import Path

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError
from nats.aio.msg import Msg
from opentelemetry import metrics

from countersign.services.protocol.errors import BrokenChain
from countersign.services.protocol.subjects import commit_subject
from countersign.services.runtime.announcer import EVENTS
from countersign.services.runtime.clock import wall_ms
from countersign.services.runtime.errors import CountersignError, NotFound
from countersign.services.runtime.service import Call, Context
from countersign.services.sidecar.watch import MOST_FAULTS, Watch, Watched
from countersign.v1 import sidecar_pb2
from countersign.v1.event_pb2 import ProtocolEvents
from countersign.v1.registry_pb2 import Instance
from countersign.v1.sidecar_pb2 import GetRunRequest, GetRunResponse, StatusRequest, StatusResponse, Violation
from countersign.verify.spec.monitor import Fault
from countersign.verify.spec.run import Record, write_run

COMMITTED = "cs.v1.committed."
VIOLATIONS = "cs.v1.event.violation"

# Record and event travel by themselves; which waits longer for the other than this lacks it.
PATIENCE_S = 0.5
LOOK_S = 0.1
# After a close its clients still get their last tokens.
LINGER_S = 1.0
NICENESS = 10


class SidecarService:
    """Watches; ``folder`` takes the evidence, and every run where ``record`` is set."""

    descriptor: ServiceDescriptor = sidecar_pb2.DESCRIPTOR.services_by_name["SidecarService"]

    def __init__(self, context: Context, folder: Path) -> None:
        config = context.config.sidecar
        self._bus, self._journal, self._log = context.bus, context.journal, context.log
        self._folder, self._record = folder, config.record
        self._watch = Watch(config.requests)
        self._records = self._events = 0
        self._violations: deque[Violation] = deque(maxlen=MOST_FAULTS)
        self._violation_count = 0
        self._dropped = 0
        meter = metrics.get_meter("countersign")
        self._counter = meter.create_counter("countersign.protocol.violations", unit="{violation}")

    async def run(self) -> None:
        """Watch for ever."""
        records = await self._bus.subscribe(f"{COMMITTED}*", self._on_record)
        events = await self._bus.subscribe(EVENTS, self._on_events)
        try:
            while True:
                await asyncio.sleep(LOOK_S)
                await self._look()
        finally:
            await self._bus.unsubscribe(records)
            await self._bus.unsubscribe(events)

    async def close(self) -> None:
        """Nothing is held."""

    def describe(self, instance: Instance) -> None:
        instance.active_requests = sum(watched.closed_at == 0 for watched in self._watch.all())

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

    async def _on_record(self, msg: Msg) -> None:
        sequence = int((msg.headers or {}).get("Nats-Sequence", "0"))
        watched = self._watch.request(msg.subject.removeprefix(COMMITTED))
        try:
            await self._take(watched, sequence, msg.data)
        except BrokenChain:
            # Of a request that is older than this process nobody repeats what its parties said.
            watched.whole = watched.whole and watched.monitor.log.records > 0
            await self._catch_up(watched)

    async def _catch_up(self, watched: Watched) -> None:
        """Read what the subscription missed: the beginning of a request that is older than this process, or a gap."""
        log = watched.monitor.log
        try:
            for entry in await self._journal.read(commit_subject(log.request_id), after=log.sequence):
                await self._take(watched, entry.sequence, entry.data)
        except BrokenChain as error:
            await self._report(watched, [watched.monitor.broken(error)])
        except CountersignError as error:
            self._log.warning("a log cannot be read request=%s error=%s", log.request_id, error.reason)

    async def _take(self, watched: Watched, sequence: int, data: bytes) -> None:
        before = watched.monitor.log.sequence
        faults = watched.monitor.record(sequence, data, time.monotonic())
        if sequence > before:
            self._records += 1
            watched.records.append(Record(sequence, data))
        if watched.monitor.log.closed is not None and not watched.closed_at:
            watched.closed_at = time.monotonic()
        await self._report(watched, faults)

    async def _on_events(self, msg: Msg) -> None:
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
                await self._report(watched, faults)

    async def _look(self) -> None:
        """What has waited too long, and what is over."""
        now = time.monotonic()
        if self._bus.dropped > self._dropped:
            self._dropped = self._bus.dropped
            self._log.warning("messages were dropped: of what is open only the logs are judged")
            for watched in self._watch.restless():
                watched.whole = False
        for watched in self._watch.restless():
            overdue = watched.monitor.overdue(now, PATIENCE_S)
            if watched.whole:
                await self._report(watched, overdue)
            if watched.closed_at and now - watched.closed_at > LINGER_S:
                self._watch.rests(watched)
                if self._record and watched.whole and not watched.written:
                    watched.written = True
                    await self._store(watched, "runs")

    async def _report(self, watched: Watched, faults: list[Fault]) -> None:
        for fault in watched.news(faults):
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
            self._counter.add(1, {"countersign.property": fault.property})
            self._log.error(
                "the protocol is violated request=%s property=%s what=%s evidence=%s",
                violation.request_id,
                violation.property,
                violation.what,
                evidence,
            )
            try:
                await self._bus.publish(VIOLATIONS, violation.SerializeToString(), {})
            except CountersignError as error:
                self._log.warning("a violation could not be published error=%s", error.reason)

    async def _store(self, watched: Watched, kind: str) -> str:
        """The run's file, below ``folder``; empty when it could not be written."""
        file = self._folder / kind / f"{watched.monitor.log.request_id}.jsonl"
        run = watched.run

        def write() -> None:
            text = write_run(run)
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(".partial")
            partial.write_text(text)
            partial.replace(file)

        try:
            await asyncio.to_thread(write)
        except OSError:
            self._log.exception("a run could not be stored file=%s", file)
            return ""
        return str(file)


async def create(context: Context) -> SidecarService:
    """It needs nothing but the bus and a folder, and stands back for those whose work it watches."""
    os.nice(NICENESS)
    return SidecarService(context, context.config.data_dir)
