"""Spans that cost a fifth of the SDK's to make, behind OpenTelemetry's API; all that comes after them is the SDK's.

A request makes some twenty spans and an event a round, in the processes that also move its tokens. The SDK copies,
checks and locks each of them for users whom it does not know; here one thread writes a span, with attributes that are
right. What these spans show is what the SDK's processors and exporters read of a `ReadableSpan`.

A first token waits for what is done before it, in processes whose caches others have used meanwhile: there each
function costs ten times what it does in a loop. So a span begins with next to nothing: its context is text, and drawn
when somebody asks for it or the span ends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from random import getrandbits
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor
from opentelemetry.sdk.trace.sampling import TraceIdRatioBased
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    INVALID_SPAN,
    Link,
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceState,
)
from opentelemetry.util.types import Attributes, AttributeValue

from countersign.services.runtime.telemetry.traceparent import (
    RemoteSpan,
    is_sampled,
    numbers,
    of_ids,
    trace_state,
    traceparent,
)

# Of one span: what comes beyond is counted.
MOST_EVENTS = 512
_UNSET = Status()


class RecordedEvent:
    """An event of a span; see ``opentelemetry.sdk.trace.Event``."""

    __slots__ = ("attributes", "name", "timestamp")
    dropped_attributes = 0

    def __init__(self, name: str, attributes: Mapping[str, Any], timestamp: int) -> None:
        self.name, self.attributes, self.timestamp = name, attributes, timestamp


class RecordedSpan(trace.Span):
    """A span of this process, below the one that ``above`` names (``remote``: in another process), or below none.
    Not for two threads at once, but for its end.
    """

    __slots__ = (
        "_above",
        "_at_end",
        "_context",
        "_own",
        "_processor",
        "_remote",
        "attributes",
        "dropped_events",
        "end_time",
        "events",
        "instrumentation_scope",
        "kind",
        "links",
        "name",
        "resource",
        "start_time",
        "status",
        "trace_state",
    )
    dropped_attributes = dropped_links = 0

    def __init__(
        self,
        name: str,
        own: str,
        above: str,
        trace_state: TraceState | None,
        kind: SpanKind,
        attributes: Attributes,
        start_time: int | None,
        tracer: RecordingTracer,
        remote: bool = True,
        links: Sequence[Link] | None = None,
    ) -> None:
        self.name, self.kind = name, kind
        self._own, self._above, self._remote, self.trace_state = own, above, remote, trace_state
        self._context: SpanContext | None = None
        self._at_end: tuple[Callable[[int], None], ...] = ()
        self.attributes: dict[str, AttributeValue] = {**attributes} if attributes else {}
        self.start_time, self.end_time = start_time or time.time_ns(), 0
        self.events: list[RecordedEvent] = []
        self.links: Sequence[Link] = links or ()
        self.status, self.dropped_events = _UNSET, 0
        self.resource, self.instrumentation_scope = tracer.resource, tracer.scope
        self._processor = tracer.processor

    @property
    def traceparent(self) -> str:
        """Its context, as it travels."""
        if not self._own:
            self._own = _below(self._above)
        return self._own

    @property
    def context(self) -> SpanContext:
        """The same as numbers."""
        if self._context is None:
            self._context = numbers(self.traceparent, remote=False, state=self.trace_state)
        return self._context

    @property
    def parent(self) -> SpanContext | None:
        """The context of the span above; None where there is none."""
        return numbers(self._above, remote=self._remote, state=self.trace_state) if self._above else None

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

    def at_end(self, then: Callable[[int], None]) -> None:
        """Call it when this ends, with the time; now, where it has ended."""
        if self.end_time:
            then(self.end_time)
        else:
            self._at_end += (then,)

    def end(self, end_time: int | None = None) -> None:
        if not self.end_time:
            self.end_time = end_time or time.time_ns()
            at_end, self._at_end = self._at_end, ()  # they know this span: nothing is to wait for the collector
            for then in at_end:
                then(self.end_time)
            self._processor.on_end(self)  # type: ignore[arg-type]  # as good as a ReadableSpan


def _below(above: str) -> str:
    """A new span's context, in the trace of the one that ``above`` names."""
    return f"{above[:36]}{getrandbits(64) or 1:016x}-{'01' if is_sampled(above) else '00'}"


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
        own = above = ""
        remote, state = False, None
        # A look at an empty context is dear, and at none it is one at the current one.
        parent = INVALID_SPAN if context is not None and not context else trace.get_current_span(context)  # noqa: TID251  the API has it so
        if parent is not INVALID_SPAN and (above := traceparent(parent)):
            remote, state = _is_remote(parent), trace_state(parent)
        else:
            trace_id = getrandbits(128) or 1
            sampled = trace_id & TraceIdRatioBased.TRACE_ID_LIMIT < self._bound
            own = of_ids(trace_id, getrandbits(64) or 1, sampled)
        if not self._all and not is_sampled(own or above):
            return NonRecordingSpan(numbers(own or _below(above), remote=False, state=state))
        return RecordedSpan(name, own, above, state, kind, attributes, start_time, self, remote, links)

    def start_below(
        self, name: str, above: str, attributes: Attributes, kind: SpanKind, start_time: int | None
    ) -> trace.Span:
        """A span below the one of another process that a traceparent names."""
        if not self._all and not is_sampled(above):
            return NonRecordingSpan(numbers(_below(above), remote=False))
        return RecordedSpan(name, "", above, None, kind, attributes, start_time, self)

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


def _is_remote(span: trace.Span) -> bool:
    if type(span) is RecordedSpan:
        return False
    return type(span) is RemoteSpan or span.get_span_context().is_remote


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
