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
from dataclasses import dataclass, field
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
_NOWHERE = Context()


def tracer(provider: TracerProvider | None = None) -> Tracer:
    """The runtime's tracer; of the process's provider when none is given."""
    return trace.get_tracer("countersign.runtime", tracer_provider=provider)


def inject(carrier: MutableMapping[str, str], span: Span) -> None:
    """Write the span's context (traceparent, tracestate) into headers or metadata."""
    context = span.get_span_context()
    if not context.is_valid:
        return
    carrier["traceparent"] = traceparent(span)
    if context.trace_state:
        carrier["tracestate"] = context.trace_state.to_header()


def extract(carrier: Mapping[str, str]) -> Context:
    """The caller's context; an empty one when the headers hold none."""
    return _PROPAGATOR.extract(carrier, context=_NOWHERE) if "traceparent" in carrier else _NOWHERE


def traceparent(span: Span) -> str:
    """The span's context as text; empty when it is in no trace."""
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}" if context.is_valid else ""


def context_of(text: str) -> SpanContext | None:
    """The span that a traceparent names; None when it is empty or names none."""
    context = trace.get_current_span(extract({"traceparent": text})).get_span_context() if text else None
    return context if context is not None and context.is_valid else None


def parent_of(span: SpanContext | None) -> Context | None:
    """For spans below a span of another process; None where there is none."""
    return None if span is None or not span.is_valid else trace.set_span_in_context(NonRecordingSpan(span))


def rpc_attributes(system: str, service: str, method: str) -> dict[str, str]:
    """OpenTelemetry's semantic conventions for RPC; over NATS the subject is ``cs.v1.<service>.<method>``."""
    return {"rpc.system": system, "rpc.service": service, "rpc.method": method}


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
    """What a span's time goes into, one phase after the other without a gap. They become spans below it when the last
    one ends: while the request waits, only the times are taken.
    """

    def __init__(self, source: Tracer, parent: Span) -> None:
        self._source = source
        self._parent = parent
        self._on = parent.is_recording()
        self._phases: list[_Phase] = []

    def begin(self, name: str) -> None:
        """The next one, from now on; the one before it ends. Nothing changes when it is the same."""
        if self._on and not (self._phases and self._phases[-1].name == name):
            self._phases.append(_Phase(name, time.time_ns()))

    def note(self, key: str, value: AttributeValue) -> None:
        """An attribute of the one that is now."""
        if self._phases:
            self._phases[-1].attributes[key] = value

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """The next one; it lasts until the one after it begins, and has failed if a CountersignError comes through."""
        self.begin(name)
        try:
            yield
        except CountersignError as error:
            if self._phases:
                self._phases[-1].error = error
            raise

    def end(self) -> None:
        """The last one ends."""
        phases, self._phases = self._phases, []
        ends = [phase.began_ns for phase in phases[1:]] + [None]  # the last one: now
        context = trace.set_span_in_context(self._parent)
        for phase, end in zip(phases, ends, strict=False):
            span = self._source.start_span(phase.name, context, attributes=phase.attributes, start_time=phase.began_ns)
            if phase.error is not None:
                record_error(span, phase.error)
            span.end(end)


@dataclass(slots=True)
class _Phase:
    name: str
    began_ns: int
    attributes: dict[str, AttributeValue] = field(default_factory=dict)
    error: CountersignError | None = None


def _in_trace(span: Span) -> bool:
    return span.get_span_context().is_valid
