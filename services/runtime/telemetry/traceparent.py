"""The W3C trace context as the text that travels: ``00-<trace>-<span>-<flags>``.

Nearly all that a request does with a context is to pass it on. So it stays text: spans of ours and those of other
processes have it as ``traceparent``, and a `SpanContext` is made of it where somebody asks for its numbers.
"""

from __future__ import annotations

import re

from opentelemetry.trace import NonRecordingSpan, Span, SpanContext, TraceFlags, TraceState

# What all of us write; other versions are the propagator's. Zeros name nothing.
_TEXT = re.compile("00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
_ODD = frozenset("13579bdf")
_UNKNOWN = TraceState()


def is_traceparent(text: str) -> bool:
    """Whether it is one of ours and names a span. The functions below take no other."""
    return _TEXT.fullmatch(text) is not None


def is_sampled(text: str) -> bool:
    """Whether its trace is to be kept."""
    return text[54] in _ODD


def numbers(text: str, *, remote: bool, state: TraceState | None = None) -> SpanContext:
    """The context that it is."""
    flags = TraceFlags(int(text[53:], 16))
    return SpanContext(
        int(text[3:35], 16), int(text[36:52], 16), is_remote=remote, trace_flags=flags, trace_state=state
    )


def ids(text: str) -> tuple[str, str]:
    """Of the trace and of the span, in hexadecimal."""
    return text[3:35], text[36:52]


def of_ids(trace_id: int, span_id: int, flags: int) -> str:
    """The text that names a span."""
    return f"00-{trace_id:032x}-{span_id:016x}-{flags:02x}"


def traceparent(span: Span) -> str:
    """The span's context; empty when it is in no trace."""
    text: str | None = getattr(span, "traceparent", None)
    if text is not None:
        return text
    context = span.get_span_context()
    return of_ids(context.trace_id, context.span_id, context.trace_flags) if context.is_valid else ""


def trace_state(span: Span) -> TraceState | None:
    """What travels beside it, from other systems."""
    state: TraceState | None = getattr(span, "trace_state", _UNKNOWN)
    return span.get_span_context().trace_state if state is _UNKNOWN else state


class RemoteSpan(NonRecordingSpan):
    """A span of another process."""

    trace_state = None

    def __init__(self, traceparent: str) -> None:
        self.traceparent = traceparent

    def get_span_context(self) -> SpanContext:
        return numbers(self.traceparent, remote=True)

    def __repr__(self) -> str:
        return f"RemoteSpan({self.traceparent!r})"
