"""Spans, and the W3C trace context that ties them together over NATS, gRPC and the token log.

It uses the OpenTelemetry API only: unless the process wires an SDK (wiring.py), all of this does nothing. What belongs
to no trace is not traced: only a gRPC call from outside and `Client.generate` begin one.
"""

from __future__ import annotations

import re
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from contextvars import Context as ContextVars
from contextvars import Token, copy_context
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType, TracebackType
from typing import TypeVar

from opentelemetry import trace
from opentelemetry.context import Context, attach, detach
from opentelemetry.trace import (
    INVALID_SPAN,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from countersign.services.runtime.errors import CountersignError
from countersign.services.runtime.telemetry.late import LateSpan

T = TypeVar("T")
Attributes = Mapping[str, AttributeValue]

_PROPAGATOR = TraceContextTextMapPropagator()
# What all of us write. Other versions, and tracestate, are the propagator's.
_TRACEPARENT = re.compile("00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_NOWHERE = Context()


def tracer(provider: TracerProvider | None = None) -> Tracer:
    """The runtime's tracer; of the process's provider when none is given."""
    return trace.get_tracer("countersign.runtime", tracer_provider=provider)


def inject(carrier: MutableMapping[str, str], span: Span) -> None:
    """Write the span's context (traceparent, tracestate) into headers or metadata."""
    context = span.get_span_context()
    if not context.is_valid:
        return
    carrier["traceparent"] = _written(context)
    if context.trace_state:
        carrier["tracestate"] = context.trace_state.to_header()


def extract(carrier: Mapping[str, str]) -> Context:
    """The caller's context; an empty one when the headers hold none."""
    text = carrier.get("traceparent")
    if not text:
        return _NOWHERE
    if "tracestate" in carrier or (named := _TRACEPARENT.fullmatch(text)) is None:
        return _PROPAGATOR.extract(carrier, context=_NOWHERE)
    return parent_of(_named(named)) or _NOWHERE


def _named(match: re.Match[str]) -> SpanContext:
    trace_id, span_id, flags = match.groups()
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


def traceparent(span: Span) -> str:
    """The span's context as text; empty when it is in no trace."""
    context = span.get_span_context()
    return _written(context) if context.is_valid else ""


def _written(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def context_of(text: str) -> SpanContext | None:
    """The span that a traceparent of ours names; None when it is empty or names none."""
    match = _TRACEPARENT.fullmatch(text)
    context = None if match is None else _named(match)
    return context if context is not None and context.is_valid else None


def parent_of(span: SpanContext | None) -> Context | None:
    """For spans below a span of another process; None where there is none."""
    return None if span is None or not span.is_valid else trace.set_span_in_context(NonRecordingSpan(span), _NOWHERE)


@lru_cache(maxsize=256)
def rpc_attributes(system: str, service: str, method: str) -> Attributes:
    """OpenTelemetry's semantic conventions for RPC; over NATS the subject is ``cs.v1.<service>.<method>``."""
    return MappingProxyType({"rpc.system": system, "rpc.service": service, "rpc.method": method})


def client_span(source: Tracer, name: str, attributes: Attributes) -> Ended:
    """A span of the caller's side, below the current one; it ends with the block. It is not made current: a generator
    may yield within it.
    """
    if not _in_trace(trace.get_current_span()):
        return _UNTRACED
    return Ended(source.start_span(name, kind=SpanKind.CLIENT, attributes=attributes))


def unanswered(source: Tracer, name: str, attributes: Attributes, began_ns: int, error: CountersignError) -> None:
    """A span of the caller's side, below the current one, of a call that nobody answered: no other span tells of it."""
    if _in_trace(trace.get_current_span()):
        span = source.start_span(name, kind=SpanKind.CLIENT, attributes=attributes, start_time=began_ns)
        record_error(span, error)
        span.end()


def server_span(source: Tracer, name: str, attributes: Attributes, carrier: Mapping[str, str]) -> Ended:
    """A span of the answering side, current within the block, a child of the caller's; a call of no trace begins
    one.
    """
    return Current(source.start_span(name, extract(carrier), SpanKind.SERVER, attributes))


def late_server_span(source: Tracer, name: str, attributes: Attributes, carrier: Mapping[str, str]) -> Ended:
    """The same, made when it ends if nobody asks for it before, so that an answer need not wait for it; of a call of no
    trace there is none.
    """
    if "traceparent" not in carrier:
        return _UNTRACED
    began = time.time_ns()

    def make() -> Span:
        context = extract(carrier)
        if context is _NOWHERE:
            return INVALID_SPAN
        return source.start_span(name, context, SpanKind.SERVER, attributes, start_time=began)

    return Current(LateSpan(make))


def step(source: Tracer, name: str, parent: Context | None, attributes: Attributes | None = None) -> Ended:
    """A span of work within this process, current while it lasts. Without ``parent`` there is none."""
    if parent is None:
        return _UNTRACED
    return Current(source.start_span(name, context=parent, attributes=attributes))


class Ended:
    """A block with whose end the span ends, as failed if a CountersignError comes through."""

    __slots__ = ("span",)

    def __init__(self, span: Span) -> None:
        self.span = span

    def __enter__(self) -> Span:
        return self.span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, CountersignError):
            record_error(self.span, error)
        self.span.end()


class Current(Ended):
    """The same; what is done within belongs to the span."""

    __slots__ = ("_token",)
    _token: Token[Context]

    def __enter__(self) -> Span:
        self._token = attach(trace.set_span_in_context(self.span))
        return self.span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        detach(self._token)
        super().__exit__(kind, error, traceback)


_UNTRACED = Ended(INVALID_SPAN)


@contextmanager
def current(span: Span) -> Iterator[None]:
    """What is done within belongs to ``span``, which this does not end."""
    token = attach(trace.set_span_in_context(span))
    try:
        yield
    finally:
        detach(token)


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
