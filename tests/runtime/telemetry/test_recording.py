"""Our spans against the SDK's: the same calls give the same OTLP, but for ids and times."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, Tracer

from countersign.services.runtime.telemetry.recording import MOST_EVENTS, RecordingProvider

RESOURCE = Resource({"service.name": "test"})
TEXTS = st.text("abc.", min_size=1, max_size=5)
ATTRIBUTES = st.dictionaries(TEXTS, st.integers(0, 9) | st.booleans() | st.floats(0, 1) | TEXTS, max_size=4)
STATUSES = st.sampled_from([Status(), Status(StatusCode.OK), Status(StatusCode.ERROR, "why"), Status(StatusCode.ERROR)])
CALLS = st.one_of(
    st.tuples(st.just("set_attributes"), st.tuples(ATTRIBUTES)),
    st.tuples(st.just("set_attribute"), st.tuples(TEXTS, st.integers(0, 9))),
    st.tuples(st.just("add_event"), st.tuples(TEXTS, ATTRIBUTES, st.integers(1, 99))),
    st.tuples(st.just("add_link"), st.tuples(st.just(SpanContext(5, 6, is_remote=True)), ATTRIBUTES)),
    st.tuples(st.just("update_name"), st.tuples(TEXTS)),
    st.tuples(st.just("set_status"), st.tuples(STATUSES)),
    st.tuples(st.just("end"), st.tuples(st.integers(100, 200))),
)


class Kept(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)

    def written(self) -> list[Span]:
        """What the SDK's own encoder makes of them, without ids, and attributes by their names."""
        if not self.spans:
            return []
        spans = list(encode_spans(self.spans).resource_spans[0].scope_spans[0].spans)
        for span in spans:
            span.ClearField("span_id")
            span.attributes.sort(key=lambda attribute: attribute.key)
        return spans


def both() -> list[tuple[Tracer, Kept]]:
    kept, theirs = Kept(), Kept()
    sdk = TracerProvider(resource=RESOURCE, shutdown_on_exit=False)
    sdk.add_span_processor(theirs)
    return [(RecordingProvider(RESOURCE, kept).get_tracer("t"), kept), (sdk.get_tracer("t"), theirs)]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=200, deadline=None)
@given(st.lists(CALLS, max_size=8), ATTRIBUTES, st.sampled_from(SpanKind), st.booleans())
def test_the_same_calls_give_the_same_span(
    calls: list[tuple[str, Any]], attributes: dict[str, Any], kind: SpanKind, remote: bool
) -> None:
    parent = SpanContext(7, 8, is_remote=remote, trace_flags=TraceFlags(1))
    context = trace.set_span_in_context(trace.NonRecordingSpan(parent))
    written = []
    for tracer, kept in both():
        span = tracer.start_span("name", context, kind, attributes, start_time=50)
        for method, arguments in calls:
            getattr(span, method)(*arguments)
        span.end(300)
        span.end(400)
        assert not span.is_recording()
        written.append(kept.written())
    assert written[0] == written[1]


def test_a_trace_begins_without_a_parent_and_goes_on_below_one() -> None:
    for tracer, kept in both():
        with tracer.start_as_current_span("outer") as outer, tracer.start_as_current_span("inner"):
            pass
        inner, root = kept.spans
        assert root.parent is None
        assert inner.parent == outer.get_span_context()
        assert inner.context is not None
        assert inner.context.trace_id == outer.get_span_context().trace_id
        assert inner.context.trace_flags.sampled


def test_no_more_events_than_there_is_room_for_and_the_rest_are_counted() -> None:
    kept = Kept()
    span = RecordingProvider(RESOURCE, kept).get_tracer("t").start_span("x")
    for number in range(MOST_EVENTS + 3):
        span.add_event(str(number))
    span.end()
    (written,) = kept.written()
    assert len(written.events) == MOST_EVENTS
    assert written.dropped_events_count == 3


def test_an_exception_is_told_by_its_type_alone() -> None:
    kept = Kept()
    tracer = RecordingProvider(RESOURCE, kept).get_tracer("t")
    with pytest.raises(ValueError, match="secret"), tracer.start_as_current_span("x"):
        raise ValueError("secret")
    assert [event.name for event in kept.spans[0].events] == ["exception"]
    assert "secret" not in str(kept.written()[0].events)


def test_what_nobody_wants_is_not_recorded() -> None:
    kept = Kept()
    span = RecordingProvider(RESOURCE, kept, share=0.0).get_tracer("t").start_span("x")
    assert not span.is_recording()
    assert span.get_span_context().is_valid
    span.end()
    assert kept.spans == []
