"""Connects the API's spans to where they go when a process starts: an OTLP collector, else files on this machine."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from nats.aio.msg import Msg
from opentelemetry import trace

from countersign import __version__
from countersign.services.runtime.config import TelemetryConfig
from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.telemetry.kept import FOLDER, KeptSpans

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter

    from countersign.services.runtime.bus import Bus
    from countersign.services.runtime.telemetry.recording import RecordingProvider
    from countersign.services.runtime.telemetry.sampling import KeepingProcessor

KEEP_SUBJECT = "cs.v1.event.keep"
_EXPORT_TIMEOUT_S = 2
_END_S = 2.0
# A request's spans are there a second after its end; few at a time, since their encoding keeps others from Python.
_EVERY_MS = 1000
_AT_ONCE = 64
_MOST_WAITING = 4096
_SAID_EVERY_S = 60.0

_log = logging.getLogger(__name__)


class Wiring:
    """What was wired; ``join`` it to the bus, ``close`` it at the end. This one: nothing."""

    async def join(self, bus: Bus) -> None:
        """Tell other processes which traces are kept, and hear it from them."""

    def close(self) -> None:
        """Send what waits; takes two seconds at most."""


class _Traces(Wiring):
    def __init__(self, provider: RecordingProvider, exporter: SpanExporter, keeping: KeepingProcessor | None) -> None:
        self._provider = provider
        self._exporter = exporter
        self._keeping = keeping
        self._told: set[asyncio.Task[None]] = set()

    async def join(self, bus: Bus) -> None:
        keeping = self._keeping
        if keeping is None:
            return
        loop = asyncio.get_running_loop()

        async def hears(msg: Msg) -> None:
            keeping.keep(int.from_bytes(msg.data[:16], "big"))

        async def says(trace_id: int) -> None:
            try:
                await bus.publish(KEEP_SUBJECT, trace_id.to_bytes(16, "big"), {})
            except CountersignError as error:
                _log.debug("nobody was told to keep a trace", extra={"reason": error.reason})

        def spawn(trace_id: int) -> None:
            task = loop.create_task(says(trace_id))
            self._told.add(task)
            task.add_done_callback(self._told.discard)

        await bus.subscribe(KEEP_SUBJECT, hears)

        def tell(trace_id: int) -> None:
            loop.call_soon_threadsafe(partial(spawn, trace_id))

        keeping.tell = tell

    def close(self) -> None:
        ending = threading.Thread(target=self._provider.shutdown, daemon=True, name="telemetry ends")
        ending.start()
        ending.join(_END_S)
        if ending.is_alive():  # a collector that does not answer
            self._exporter.shutdown()


def start(config: TelemetryConfig, *, service: str, instance: str, data_dir: Path) -> Wiring:
    """Wire the OpenTelemetry SDK; without a place for spans nothing is wired, and the SDK is not even imported."""
    if not config.spans or not (config.otlp_endpoint or config.kept_bytes):
        return Wiring()
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from countersign.services.runtime.telemetry.recording import RecordingProvider
    from countersign.services.runtime.telemetry.sampling import KeepingProcessor

    resource = Resource.create(
        {
            "service.name": service,
            "service.namespace": config.service_namespace,
            "service.instance.id": instance,
            "service.version": __version__,
        }
    )
    said = logging.getLogger("opentelemetry")
    said.propagate = False
    said.handlers = [_Seldom()]
    exporter = _otlp(config) if config.otlp_endpoint else KeptSpans(data_dir / FOLDER, instance, config.kept_bytes)
    batches = BatchSpanProcessor(
        exporter, max_queue_size=_MOST_WAITING, schedule_delay_millis=_EVERY_MS, max_export_batch_size=_AT_ONCE
    )
    keeping = KeepingProcessor(batches) if config.sample < 1 else None
    provider = RecordingProvider(resource, keeping or batches, share=config.sample, records_all=keeping is not None)
    trace.set_tracer_provider(provider)
    return _Traces(provider, exporter, keeping)


def _otlp(config: TelemetryConfig) -> SpanExporter:
    if config.otlp_protocol == "http":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter

        return HttpExporter(endpoint=f"{config.otlp_endpoint.rstrip('/')}/v1/traces", timeout=_EXPORT_TIMEOUT_S)
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    from countersign.services.runtime.telemetry.encoding import encode

    class Exporter(GrpcExporter):
        def _translate_data(self, data: Sequence[ReadableSpan]) -> ExportTraceServiceRequest:
            return ExportTraceServiceRequest.FromString(encode(data))

    return Exporter(endpoint=config.otlp_endpoint, timeout=_EXPORT_TIMEOUT_S)


class _Seldom(logging.Handler):
    """A collector that is down must not flood the log: each place in the SDK's code is heard once a minute."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[tuple[str, int], float] = {}

    def emit(self, record: logging.LogRecord) -> None:
        place, now = (record.pathname, record.lineno), time.monotonic()
        if now >= self._next.get(place, 0.0):
            self._next[place] = now + _SAID_EVERY_S
            logging.getLogger().handle(record)
