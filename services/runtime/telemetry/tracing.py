"""Spans, and the W3C trace context that ties them together over NATS, gRPC and the token log.

It uses the OpenTelemetry API only: unless the process wires an SDK (wiring.py), all of this does nothing. What belongs
to no trace is not traced: only a gRPC call from outside and `Client.generate` begin one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import Context as ContextVars
from contextvars import copy_context
from typing import TypeVar

from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    TracerProvider,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from countersign.services.runtime.errors import CountersignError

T = TypeVar("T")
Attributes = Mapping[str, AttributeValue]

_PROPAGATOR = TraceContextTextMapPropagator()


def tracer(provider: TracerProvider | None = None) -> Tracer:
    """The runtime's tracer; of the process's provider when none is given."""
    return trace.get_tracer("countersign.runtime", tracer_provider=provider)


def inject(carrier: MutableMapping[str, str], span: Span) -> None:
    """Write the span's context (traceparent, tracestate) into headers or metadata."""
    _PROPAGATOR.inject(carrier, context=trace.set_span_in_context(span))


def extract(carrier: Mapping[str, str]) -> Context:
    """The caller's context; an empty one when the headers hold none."""
    return _PROPAGATOR.extract(carrier, context=Context())


def traceparent(span: Span) -> str:
    """The span's context as text; empty when it is in no trace."""
    carrier: dict[str, str] = {}
    inject(carrier, span)
    return carrier.get("traceparent", "")


def context_of(text: str) -> SpanContext | None:
    """The span that a traceparent names; None when it is empty or names none."""
    context = trace.get_current_span(extract({"traceparent": text})).get_span_context() if text else None
    return context if context is not None and context.is_valid else None


def parent_of(span: SpanContext | None) -> Context | None:
    """For spans below a span of another process; None where there is none."""
    return None if span is None or not span.is_valid else trace.set_span_in_context(NonRecordingSpan(span))


def rpc_attributes(system: str, service: str, method: str) -> dict[str, str]:
    """OpenTelemetry's semantic conventions for RPC."""
    return {"rpc.system": system, "rpc.service": service, "rpc.method": method}


def messaging_attributes(subject: str, operation: str) -> dict[str, str]:
    """OpenTelemetry's semantic conventions for messaging, on NATS."""
    return {
        "messaging.system": "nats",
        "messaging.destination.name": subject,
        "messaging.operation.type": operation,
    }


@contextmanager
def client_span(source: Tracer | None, name: str, attributes: Attributes) -> Iterator[Span]:
    """A span of the caller's side, below the current one. It is not made current: a generator may yield within it.
    None without ``source``.
    """
    if source is None or not _in_trace(trace.get_current_span()):
        yield INVALID_SPAN
        return
    span = source.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
    with ended(span):
        yield span


@contextmanager
def server_span(
    source: Tracer, name: str, attributes: Attributes, carrier: Mapping[str, str], *, root: bool = False
) -> Iterator[Span]:
    """A span of the answering side, current while the handler runs, a child of the caller's; a call of no trace begins
    one where ``root``.
    """
    context = extract(carrier)
    if not (root or _in_trace(trace.get_current_span(context))):
        yield INVALID_SPAN
        return
    span = source.start_span(name, context=context, kind=SpanKind.SERVER, attributes=attributes)
    with ended(span), current(span):
        yield span


@contextmanager
def step(source: Tracer, name: str, parent: Context | None, attributes: Attributes | None = None) -> Iterator[Span]:
    """A span of work within this process, current while it lasts. Without ``parent`` there is none."""
    if parent is None:
        yield INVALID_SPAN
        return
    span = source.start_span(name, context=parent, attributes=attributes)
    with ended(span), current(span):
        yield span


@contextmanager
def ended(span: Span) -> Iterator[None]:
    """Ends the span, as failed if a CountersignError comes through."""
    try:
        yield
    except CountersignError as error:
        record_error(span, error)
        raise
    finally:
        span.end()


@contextmanager
def current(span: Span) -> Iterator[None]:
    """What is done within belongs to ``span``, which this does not end."""
    with trace.use_span(span, record_exception=False, set_status_on_exception=False):
        yield


def task_context(span: Span) -> ContextVars:
    """A context for a new task, whose work belongs to ``span``."""
    context = copy_context()
    context.run(attach, trace.set_span_in_context(span))
    return context


async def within(span: Span, stream: AsyncIterator[T]) -> AsyncGenerator[T]:
    """The items of ``stream``, whose work belongs to ``span``; what their reader does in between does not."""
    while True:
        with current(span):
            try:
                item = await anext(stream)
            except StopAsyncIteration:
                return
        yield item


def record_error(span: Span, error: CountersignError) -> None:
    """Mark the span as failed, by the stable reason. Messages may quote what was asked, so that they stay out."""
    fail(span, error.reason)


def fail(span: Span, reason: str) -> None:
    """Mark the span as failed."""
    span.set_attribute("error.type", reason)
    span.set_status(Status(StatusCode.ERROR, reason))


class Phases:
    """What a span's time goes into: spans below it, one after the other without a gap."""

    def __init__(self, source: Tracer, parent: Span) -> None:
        self._source = source
        self._recording = parent.is_recording()
        self._context = trace.set_span_in_context(parent)
        self.now: Span = INVALID_SPAN
        self.name = ""

    def begin(self, name: str) -> Span:
        """The next one, from now on; the one before it ends."""
        if not self._recording or name == self.name:
            return self.now
        at = time.time_ns()
        self.now.end(at)
        self.name, self.now = name, self._source.start_span(name, context=self._context, start_time=at)
        return self.now

    @contextmanager
    def step(self, name: str) -> Iterator[Span]:
        """The next one, which is current meanwhile; it lasts until the one after it begins."""
        span = self.begin(name)
        with current(span):
            try:
                yield span
            except CountersignError as error:
                record_error(span, error)
                raise

    def end(self) -> None:
        """The last one ends."""
        self.now.end()
        self.name, self.now = "", INVALID_SPAN


def _in_trace(span: Span) -> bool:
    return span.get_span_context().is_valid
