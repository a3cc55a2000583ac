"""What the sidecar finds, in the trace of the request that it finds it of."""

from __future__ import annotations

from opentelemetry.trace import Tracer

from countersign.services.protocol.commit import LogState
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import metrics, tracing
from countersign.v1.sidecar_pb2 import Violation


def violated(tracer: Tracer, log: LogState, violation: Violation) -> None:
    """A failed span below the request's, which so keeps its trace. None where the log does not say which that is."""
    above = log.opened.traceparent if log.opened is not None else ""
    told = {
        names.REQUEST_ID: violation.request_id,
        metrics.PROPERTY: violation.property,
        names.VIOLATION: violation.what,
    }
    with tracing.step(tracer, "violation", above, told) as span:
        tracing.fail(span, violation.property)
