"""Our encoder against the SDK's own, on spans that Hypothesis draws."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from countersign.services.runtime.telemetry.encoding import encode

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=200)
TIMES = st.integers(1, 2**63 - 1)
SCALARS = TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.binary(max_size=20)
ATTRIBUTES = st.dictionaries(TEXTS.filter(bool), SCALARS | st.lists(TEXTS, max_size=4), max_size=6)
STATES = st.sampled_from([TraceState(), TraceState([("a", "1"), ("b", "2")])])
CONTEXTS = st.builds(
    SpanContext,
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    is_remote=st.booleans(),
    trace_flags=st.sampled_from([TraceFlags(0), TraceFlags(1)]),
    trace_state=STATES,
)
RESOURCES = [Resource({"service.name": "a"}), Resource({"service.name": "b", "n": 1}, "https://example.org/schema")]
SCOPES = [None, InstrumentationScope("one"), InstrumentationScope("two", "1.0", "https://example.org/s", {"k": "v"})]
SPANS = st.builds(
    ReadableSpan,
    name=TEXTS,
    context=CONTEXTS,
    parent=st.none() | CONTEXTS,
    resource=st.sampled_from(RESOURCES),
    attributes=ATTRIBUTES,
    events=st.lists(st.builds(Event, TEXTS, ATTRIBUTES, TIMES), max_size=4),
    links=st.lists(st.builds(Link, CONTEXTS, ATTRIBUTES), max_size=3),
    kind=st.sampled_from(SpanKind),
    status=st.sampled_from(
        [Status(), Status(StatusCode.OK), Status(StatusCode.ERROR, "why"), Status(StatusCode.ERROR)]
    ),
    start_time=TIMES,
    end_time=TIMES,
    instrumentation_scope=st.sampled_from(SCOPES),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(SPANS, max_size=5))
def test_it_writes_what_the_sdk_writes(spans: list[ReadableSpan]) -> None:
    assert ExportTraceServiceRequest.FromString(encode(spans)) == encode_spans(spans)


def test_what_is_no_attribute_or_no_text_is_written_as_it_can_be() -> None:
    attributes = {"k": Path("x"), "t": "\ud800"}
    span = ReadableSpan("x", context=SpanContext(1, 1, is_remote=False), attributes=attributes)  # type: ignore[arg-type]
    (written,) = ExportTraceServiceRequest.FromString(encode([span])).resource_spans[0].scope_spans[0].spans
    assert {each.key: each.value.string_value for each in written.attributes} == {"k": "x", "t": "?"}
