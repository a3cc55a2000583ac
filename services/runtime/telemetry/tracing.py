"""Spans, and the W3C trace context that ties them together over NATS, gRPC and the token log.

It uses the OpenTelemetry API only: unless the process wires an SDK (wiring.py), all of this does nothing. What belongs
to no trace is not traced: only a gRPC call from outside and `Client.generate` begin one.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType, TracebackType
from typing import TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    INVALID_SPAN,
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
from countersign.services.runtime.telemetry.context import current_span, enter_span, leave_span, span_context
from countersign.services.runtime.telemetry.late import LateSpan
from countersign.services.runtime.telemetry.traceparent import (
    RemoteSpan,
    is_traceparent,
    numbers,
    trace_state,
    traceparent,
)

T = TypeVar("T")
Attributes = Mapping[str, AttributeValue]

_PROPAGATOR = TraceContextTextMapPropagator()
_NOWHERE = Context()


def tracer(provider: TracerProvider | None = None) -> Tracer:
    """The runtime's tracer; of the process's provider when none is given."""
    return trace.get_tracer("countersign.runtime", tracer_provider=provider)


def inject(carrier: MutableMapping[str, str], span: Span) -> None:
    """Write the span's context (traceparent, tracestate) into headers or metadata."""
    text = traceparent(span)
    if not text:
        return
    carrier["traceparent"] = text
    if state := trace_state(span):
        carrier["tracestate"] = state.to_header()


def context_of(text: str) -> SpanContext | None:
    """The span that a traceparent names; None when it is empty or names none."""
    return numbers(text, remote=True) if is_traceparent(text) else None


def begin(
    source: Tracer,
    name: str,
    above: str,
    attributes: Attributes | None = None,
    kind: SpanKind = SpanKind.INTERNAL,
    began_ns: int | None = None,
) -> Span:
    """A span below the one of another process that the traceparent ``above`` names; none where it names none."""
    if not is_traceparent(above):
        return INVALID_SPAN
    start_below = getattr(source, "start_below", None)  # ours has it, which spares much
    if start_below is not None:
        span: Span = start_below(name, above, attributes, kind, began_ns)
        return span
    context = trace.set_span_in_context(RemoteSpan(above), _NOWHERE)
    return source.start_span(name, context, kind, attributes, start_time=began_ns)


@lru_cache(maxsize=256)
def rpc_attributes(system: str, service: str, method: str) -> Attributes:
    """OpenTelemetry's semantic conventions for RPC; over NATS the subject is ``cs.v1.<service>.<method>``."""
    return MappingProxyType({"rpc.system": system, "rpc.service": service, "rpc.method": method})


@dataclass(slots=True)
class Lasted:
    """The time of a span and of the calls that it is made of, in Unix nanoseconds: the first call is to begin with it,
    and it ends with the last one. Where a clock is read for each, another process may have its turn in between.
    """

    began_ns: int | None = None
    ended_ns: int | None = None


def client_span(source: Tracer, name: str, attributes: Attributes, lasted: Lasted | None = None) -> Ended:
    """A span of the caller's side, below the current one, which may be of whoever uses a client of ours; it ends with
    the block. It is not made current: a generator may yield within it. The first one begins as ``lasted`` says; the
    last one says there when it ended.
    """
    above = current_span()
    if above is INVALID_SPAN:
        above = trace.get_current_span()  # noqa: TID251  of whoever uses a client
    if not _in_trace(above):
        return _UNTRACED
    if lasted is None:
        return Ended(_below(source, name, above, attributes))
    began_ns, lasted.began_ns = lasted.began_ns, None
    return _Call(_below(source, name, above, attributes, began_ns), lasted)


def unanswered(source: Tracer, name: str, attributes: Attributes, began_ns: int, error: CountersignError) -> None:
    """A span of the caller's side, below the current one, of a call that nobody answered: no other span tells of it."""
    above = current_span()
    if _in_trace(above):
        span = _below(source, name, above, attributes, began_ns)
        record_error(span, error)
        span.end()


def _below(source: Tracer, name: str, above: Span, attributes: Attributes, began_ns: int | None = None) -> Span:
    context = trace.set_span_in_context(above, _NOWHERE)
    return source.start_span(name, context, SpanKind.CLIENT, attributes, start_time=began_ns)


def server_span(source: Tracer, name: str, attributes: Attributes, carrier: Mapping[str, str]) -> Ended:
    """A span of the answering side, current within the block, a child of the caller's; a call of no trace begins
    one.
    """
    if "traceparent" in carrier and (span := _answering(source, name, attributes, carrier)) is not INVALID_SPAN:
        return Current(span)
    return Current(source.start_span(name, _NOWHERE, SpanKind.SERVER, attributes))


def inner_server_span(source: Tracer, name: str, attributes: Attributes, carrier: Mapping[str, str]) -> Ended:
    """The same between our services, where a call of no trace begins none. It is made when it ends, unless somebody
    asks for it before, so that an answer need not wait for it.
    """
    if "traceparent" not in carrier:
        return _UNTRACED
    began_ns = time.time_ns()
    return Current(LateSpan(lambda: _answering(source, name, attributes, carrier, began_ns)))


def _answering(
    source: Tracer, name: str, attributes: Attributes, carrier: Mapping[str, str], began_ns: int | None = None
) -> Span:
    if "tracestate" not in carrier:
        span = begin(source, name, carrier["traceparent"], attributes, SpanKind.SERVER, began_ns)
        if span is not INVALID_SPAN:
            return span
    context = _PROPAGATOR.extract(carrier, _NOWHERE)
    if context is _NOWHERE:
        return INVALID_SPAN
    return source.start_span(name, context, SpanKind.SERVER, attributes, start_time=began_ns)


def step(source: Tracer, name: str, above: str, attributes: Attributes | None = None) -> Ended:
    """A span of work within this process, current while it lasts, below the one that ``above`` names."""
    return Current(begin(source, name, above, attributes))


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
        self.end()

    def end(self) -> None:
        """The block has been left."""
        self.span.end()


class EndedWithCalls(Ended):
    """The same; the span is of its calls' time."""

    __slots__ = ("lasted",)

    def __init__(self, span: Span, lasted: Lasted) -> None:
        super().__init__(span)
        self.lasted = lasted

    def end(self) -> None:
        self.span.end(self.lasted.ended_ns)


class _Call(EndedWithCalls):
    """The same for one of the calls."""

    __slots__ = ()

    def end(self) -> None:
        self.lasted.ended_ns = time.time_ns()
        super().end()


class Current(Ended):
    """The same; what is done within belongs to the span."""

    __slots__ = ("_token",)

    def __enter__(self) -> Span:
        self._token = enter_span(self.span)
        return self.span

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        leave_span(self._token)
        super().__exit__(kind, error, traceback)


_UNTRACED = Ended(INVALID_SPAN)


async def within(span: Span, stream: AsyncIterator[T]) -> AsyncGenerator[T]:
    """The items of ``stream``, whose work belongs to ``span``; what their reader does in between does not."""
    while True:
        with span_context(span):
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


def _in_trace(span: Span) -> bool:
    return span.get_span_context().is_valid
