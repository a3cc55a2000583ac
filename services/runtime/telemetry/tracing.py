"""Spans around calls, and the W3C trace context that ties them together over NATS and gRPC.

It uses the OpenTelemetry API only: unless the process wires an SDK (wiring.py), all of this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from countersign.services.runtime.errors import CountersignError

_PROPAGATOR = TraceContextTextMapPropagator()


def tracer(provider: TracerProvider | None) -> Tracer:
    """The runtime's tracer; of the process's provider when none is given."""
    return trace.get_tracer("countersign.runtime", tracer_provider=provider)


def inject(carrier: MutableMapping[str, str], span: Span) -> None:
    """Write the span's context (traceparent, tracestate) into headers or metadata."""
    _PROPAGATOR.inject(carrier, context=trace.set_span_in_context(span))


def extract(carrier: Mapping[str, str]) -> Context:
    """The caller's context; an empty one when the headers hold none."""
    return _PROPAGATOR.extract(carrier, context=Context())


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
def client_span(source: Tracer, name: str, attributes: Mapping[str, str]) -> Iterator[Span]:
    """A span of the caller's side. It is not made current: a generator may yield within it."""
    span = source.start_span(name, kind=SpanKind.CLIENT, attributes=attributes)
    try:
        yield span
    except CountersignError as error:
        record_error(span, error)
        raise
    finally:
        span.end()


@contextmanager
def server_span(source: Tracer, name: str, attributes: Mapping[str, str], carrier: Mapping[str, str]) -> Iterator[Span]:
    """A span of the answering side, current while the handler runs, a child of the caller's."""
    with source.start_as_current_span(
        name,
        context=extract(carrier),
        kind=SpanKind.SERVER,
        attributes=attributes,
        record_exception=False,
        set_status_on_exception=False,
    ) as span:
        yield span


def record_error(span: Span, error: CountersignError) -> None:
    """Mark the span as failed, by the stable reason."""
    span.set_attribute("error.type", error.reason)
    span.set_status(Status(StatusCode.ERROR, error.message))
