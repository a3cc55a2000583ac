"""Spans that cost a fifth of the SDK's to make, behind OpenTelemetry's API; all that comes after them is the SDK's.

A request makes some twenty spans and an event a round, in the processes that also move its tokens. The SDK copies,
checks and locks each of them for users whom it does not know; here one thread writes a span, with attributes that are
right. What these spans show is what the SDK's processors and exporters read of a `ReadableSpan`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import getrandbits
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import Attributes, AttributeValue

# Of one span: what comes beyond is counted.
MOST_EVENTS = 512
_SAMPLED, _NOT_SAMPLED = TraceFlags(TraceFlags.SAMPLED), TraceFlags(TraceFlags.DEFAULT)
_UNSET = Status()


class RecordedEvent:
    """An event of a span; see ``opentelemetry.sdk.trace.Event``."""

    __slots__ = ("attributes", "name", "timestamp")
    dropped_attributes = 0

    def __init__(self, name: str, attributes: Mapping[str, Any], timestamp: int) -> None:
        self.name, self.attributes, self.timestamp = name, attributes, timestamp


class RecordedSpan(trace.Span):
    """A span of this process. Not for two threads at once, but for its end."""

    __slots__ = (
        "_processor",
        "attributes",
        "context",
        "dropped_events",
        "end_time",
        "events",
        "instrumentation_scope",
        "kind",
        "links",
        "name",
        "parent",
        "resource",
        "start_time",
        "status",
    )
    dropped_attributes = dropped_links = 0

    def __init__(
        self,
        name: str,
        context: SpanContext,
        parent: SpanContext | None,
        kind: SpanKind,
        attributes: dict[str, AttributeValue],
        start_time: int,
        tracer: RecordingTracer,
    ) -> None:
        self.name, self.context, self.parent, self.kind = name, context, parent, kind
        self.attributes, self.start_time, self.end_time = attributes, start_time, 0
        self.events: list[RecordedEvent] = []
        self.links: Sequence[Link] = ()
        self.status, self.dropped_events = _UNSET, 0
        self.resource, self.instrumentation_scope = tracer.resource, tracer.scope
        self._processor = tracer.processor

    def get_span_context(self) -> SpanContext:
        return self.context

    def is_recording(self) -> bool:
        return not self.end_time

    def set_attribute(self, key: str, value: AttributeValue) -> None:
        if not self.end_time:
            self.attributes[key] = value

    def set_attributes(self, attributes: Mapping[str, AttributeValue]) -> None:
        if not self.end_time:
            self.attributes.update(attributes)

    def add_event(self, name: str, attributes: Attributes = None, timestamp: int | None = None) -> None:
        if self.end_time:
            return
        if len(self.events) < MOST_EVENTS:
            self.events.append(RecordedEvent(name, attributes or {}, timestamp or time.time_ns()))
        else:
            self.dropped_events += 1

    def add_link(self, context: SpanContext, attributes: Attributes = None) -> None:
        if not self.end_time:
            self.links = (*self.links, Link(context, attributes))

    def update_name(self, name: str) -> None:
        if not self.end_time:
            self.name = name

    def set_status(self, status: Status | StatusCode, description: str | None = None) -> None:
        """OK is final, and nothing takes a status back."""
        if isinstance(status, StatusCode):
            status = Status(status, description)
        final = self.end_time or self.status.status_code is StatusCode.OK
        if not final and status.status_code is not StatusCode.UNSET:
            self.status = status

    def record_exception(
        self,
        exception: BaseException,
        attributes: Attributes = None,
        timestamp: int | None = None,
        escaped: bool = False,  # noqa: ARG002
    ) -> None:
        """Its type alone: messages may quote what was asked."""
        self.add_event("exception", {**(attributes or {}), "exception.type": type(exception).__name__}, timestamp)

    def end(self, end_time: int | None = None) -> None:
        if not self.end_time:
            self.end_time = end_time or time.time_ns()
            self._processor.on_end(self)  # type: ignore[arg-type]  # as good as a ReadableSpan


class RecordingTracer(trace.Tracer):
    """Makes spans of one instrumentation scope."""

    def __init__(self, provider: RecordingProvider, scope: InstrumentationScope) -> None:
        self.resource, self.processor, self.scope = provider.resource, provider.processor, scope
        self._bound, self._all = TraceIdRatioBased.get_bound_for_rate(provider.share), provider.records_all

    def start_span(
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,  # noqa: ARG002
        set_status_on_exception: bool = True,  # noqa: ARG002
    ) -> trace.Span:
        parent: SpanContext | None = trace.get_current_span(context).get_span_context()
        if parent is not None and parent.is_valid:
            trace_id, flags, state = parent.trace_id, parent.trace_flags, parent.trace_state
            flags = _SAMPLED if flags.sampled else _NOT_SAMPLED
        else:
            trace_id, parent, state = getrandbits(128) or 1, None, None
            flags = _SAMPLED if trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < self._bound else _NOT_SAMPLED
        own = SpanContext(trace_id, getrandbits(64) or 1, is_remote=False, trace_flags=flags, trace_state=state)
        if not (flags or self._all):
            return NonRecordingSpan(own)
        told = dict(attributes) if attributes else {}
        span = RecordedSpan(name, own, parent, kind, told, start_time or time.time_ns(), self)
        span.links = links or ()
        return span

    @contextmanager
    def start_as_current_span(  # type: ignore[override]  # a plain context manager is all that is asked of it
        self,
        name: str,
        context: Context | None = None,
        kind: SpanKind = SpanKind.INTERNAL,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        start_time: int | None = None,
        record_exception: bool = True,
        set_status_on_exception: bool = True,
        end_on_exit: bool = True,
    ) -> Iterator[trace.Span]:
        span = self.start_span(name, context, kind, attributes, links, start_time)
        with trace.use_span(span, end_on_exit, record_exception, set_status_on_exception):
            yield span


class RecordingProvider(trace.TracerProvider):
    """The process's tracers, whose ended spans go to ``processor``.

    A trace that begins here is sampled or not by its id (``share``), one that goes on as where it began. Where
    ``records_all``, the processor gets the others too.
    """

    def __init__(
        self, resource: Resource, processor: SpanProcessor, *, share: float = 1.0, records_all: bool = False
    ) -> None:
        self.resource, self.processor, self.share, self.records_all = resource, processor, share, records_all

    def get_tracer(
        self,
        instrumenting_module_name: str,
        instrumenting_library_version: str | None = None,
        schema_url: str | None = None,
        attributes: Attributes = None,
    ) -> trace.Tracer:
        scope = InstrumentationScope(instrumenting_module_name, instrumenting_library_version, schema_url, attributes)
        return RecordingTracer(self, scope)

    def shutdown(self) -> None:
        """Export what waits."""
        self.processor.shutdown()
