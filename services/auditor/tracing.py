"""Where the spans of an audited request are."""

from __future__ import annotations

from opentelemetry.trace import SpanContext, TraceFlags

from countersign.verify.errors import VerificationError
from countersign.verify.receipt import parse


def request_span(receipt: bytes) -> SpanContext | None:
    """The router's span of the request, as its receipt says; None where it says nothing, or cannot be read."""
    try:
        named = parse(receipt).receipt.trace
    except VerificationError:
        return None
    if named is None:
        return None
    flags = TraceFlags(TraceFlags.SAMPLED if named.sampled else TraceFlags.DEFAULT)
    trace_id, span_id = int.from_bytes(named.id, "big"), int.from_bytes(named.span, "big")
    span = SpanContext(trace_id, span_id, is_remote=True, trace_flags=flags)
    return span if span.is_valid else None
