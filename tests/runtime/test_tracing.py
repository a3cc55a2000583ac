import gc
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    StatusCode,
    TraceFlags,
    TraceState,
    get_current_span,  # noqa: TID251  to compare with
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import Call
from countersign.services.runtime.config import TelemetryConfig
from countersign.services.runtime.errors import NotFound, Unavailable
from countersign.services.runtime.nats_server import NatsServer
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.services.runtime.telemetry import tracing, wiring
from countersign.services.runtime.telemetry.context import current_span, span_context
from countersign.services.runtime.telemetry.late import LateSpan
from countersign.services.runtime.telemetry.phases import Phases
from countersign.services.runtime.telemetry.recording import RecordedSpan, RecordingProvider
from countersign.services.runtime.telemetry.traceparent import RemoteSpan, is_sampled, numbers, traceparent
from countersign.v1.kv_pb2 import (
    GetRequest,
    GetResponse,
    GetStatsRequest,
    GetStatsResponse,
    LookupRequest,
    LookupResponse,
)


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> TracerProvider:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


def by_kind(exporter: InMemorySpanExporter, name: str) -> dict[SpanKind, ReadableSpan]:
    return {span.kind: span for span in exporter.get_finished_spans() if span.name == name}


def is_child(child: ReadableSpan, parent: ReadableSpan) -> bool:
    context = parent.get_span_context()
    return child.parent is not None and context is not None and child.parent.span_id == context.span_id


@contextmanager
def asked(provider: TracerProvider) -> Iterator[None]:
    """A span of this process, as a service would have one."""
    span = provider.get_tracer("test").start_span("asked")
    with span_context(span):
        yield
    span.end()


async def test_a_call_over_grpc_that_calls_over_nats_is_one_trace(
    server: NatsServer, provider: TracerProvider, exporter: InMemorySpanExporter, kv: type
) -> None:
    asking = await Bus.connect(server.url, "asking", tracer_provider=provider)
    answering = await Bus.connect(server.url, "answering", tracer_provider=provider)

    async def stats(request: GetStatsRequest, call: Call) -> GetStatsResponse:
        return GetStatsResponse(blocks=1)

    async def lookup(request: LookupRequest, call: Call) -> LookupResponse:
        reply = await asking.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=call.remaining())
        return LookupResponse(found=reply.blocks)

    await answering.serve("kv", "kv-1", kv(GetStats=stats).unary())
    rpc = RpcServer("127.0.0.1:0", tracer_provider=provider)
    rpc.add(kv(Lookup=lookup))
    async with Channel(await rpc.start(), tracer_provider=provider) as channel:
        with provider.get_tracer("test").start_as_current_span("asked"):
            await channel.unary("/countersign.v1.KvService/Lookup", LookupRequest(), LookupResponse, 5)
    await rpc.stop(0)
    await asking.close()
    await answering.close()

    outer, inner = by_kind(exporter, "countersign.v1.KvService/Lookup"), by_kind(exporter, "kv/GetStats")
    assert inner.keys() == {SpanKind.SERVER}
    chain = [outer[SpanKind.CLIENT], outer[SpanKind.SERVER], inner[SpanKind.SERVER]]
    assert all(is_child(child, parent) for parent, child in pairwise(chain))
    assert len({context.trace_id for span in chain if (context := span.get_span_context())}) == 1
    assert chain[1].attributes == {
        "rpc.system": "grpc",
        "rpc.service": "countersign.v1.KvService",
        "rpc.method": "Lookup",
    }
    assert (chain[2].attributes or {})["rpc.system"] == "nats"


class _Started(SpanProcessor):
    """Names of the spans that were begun."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        self.names.append(span.name)


async def test_the_span_of_an_answer_over_nats_is_made_when_the_answer_is_out_unless_it_is_asked_for(
    server: NatsServer, provider: TracerProvider, exporter: InMemorySpanExporter, kv: type
) -> None:
    started = _Started()
    provider.add_span_processor(started)
    bus = await Bus.connect(server.url, "both", tracer_provider=provider)
    times: list[int] = []

    async def stats(request: GetStatsRequest, call: Call) -> GetStatsResponse:
        times.append(time.time_ns())
        return GetStatsResponse(blocks=started.names.count("kv/GetStats"))

    async def lookup(request: LookupRequest, call: Call) -> LookupResponse:
        current_span().set_attribute("asked", True)
        current_span().add_event("asked")
        current_span().add_link(SpanContext(5, 6, is_remote=True))
        current_span().update_name("renamed")
        return LookupResponse(found=started.names.count("kv/Lookup"))

    await bus.serve("kv", "kv-1", kv(GetStats=stats, Lookup=lookup).unary())
    with asked(provider):
        assert (await bus.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=5)).blocks == 0
        assert (await bus.call("kv", "Lookup", LookupRequest(), LookupResponse, timeout=5)).found == 1
    await bus.stop_serving(5)
    await bus.close()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert (spans["kv/GetStats"].start_time or 0) < times[0] < (spans["kv/GetStats"].end_time or 0)
    assert (spans["renamed"].attributes or {})["asked"]
    assert [event.name for event in spans["renamed"].events] == ["asked"]
    assert [link.context.span_id for link in spans["renamed"].links] == [6]
    assert is_child(spans["kv/GetStats"], spans["asked"])


async def test_what_belongs_to_no_trace_is_not_traced(
    server: NatsServer, provider: TracerProvider, exporter: InMemorySpanExporter, kv: type
) -> None:
    bus = await Bus.connect(server.url, "both", tracer_provider=provider)

    async def stats(request: GetStatsRequest, call: Call) -> GetStatsResponse:
        return GetStatsResponse(blocks=1)

    async def asks(*, traced: bool = True) -> None:
        await bus.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=5, traced=traced)

    await bus.serve("kv", "kv-1", kv(GetStats=stats).unary())
    await asks()
    with asked(provider):
        await asks(traced=False)
        assert not exporter.get_finished_spans()
        await asks()
    await bus.close()
    assert sorted(span.name for span in exporter.get_finished_spans()) == ["asked", "kv/GetStats"]


async def test_a_call_over_nats_that_nobody_answers_has_a_span_all_the_same(
    server: NatsServer, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    bus = await Bus.connect(server.url, "asking", tracer_provider=provider)

    async def asks(*, traced: bool) -> None:
        with pytest.raises(Unavailable):
            await bus.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=5, traced=traced)

    await asks(traced=True)
    with asked(provider):
        await asks(traced=False)
        assert not exporter.get_finished_spans()
        await asks(traced=True)
    await bus.close()
    call, outer = exporter.get_finished_spans()
    assert (call.name, call.kind, call.status.status_code) == ("kv/GetStats", SpanKind.CLIENT, StatusCode.ERROR)
    assert (call.attributes or {})["error.type"] == "NO_RESPONDERS"
    assert is_child(call, outer)
    times = [outer.start_time, call.start_time, call.end_time, outer.end_time]
    assert sorted(time or 0 for time in times) == times


async def test_a_stream_is_in_the_trace_and_an_error_marks_both_its_spans(
    provider: TracerProvider, exporter: InMemorySpanExporter, kv: type
) -> None:
    async def get(request: GetRequest, call: Call) -> AsyncIterator[GetResponse]:
        yield GetResponse()
        raise NotFound("gone", reason="GONE")

    rpc = RpcServer("127.0.0.1:0", tracer_provider=provider)
    rpc.add(kv(Get=get))
    async with Channel(await rpc.start(), tracer_provider=provider) as channel:
        with provider.get_tracer("test").start_as_current_span("asked"), pytest.raises(NotFound):
            async for _ in channel.stream("/countersign.v1.KvService/Get", GetRequest(), GetResponse, 5):
                pass
    await rpc.stop(0)
    spans = by_kind(exporter, "countersign.v1.KvService/Get")
    assert is_child(spans[SpanKind.SERVER], spans[SpanKind.CLIENT])
    for span in spans.values():
        assert span.status.status_code is StatusCode.ERROR
        assert (span.attributes or {})["error.type"] == "GONE"


@pytest.mark.parametrize("config", [TelemetryConfig(spans=False), TelemetryConfig(kept_bytes=0)])
def test_nothing_is_wired_where_spans_go_nowhere(config: TelemetryConfig, tmp_path: Path) -> None:
    from opentelemetry import trace

    before = trace.get_tracer_provider()
    wiring.start(config, service="kv", instance="kv-1", data_dir=tmp_path).close()
    assert trace.get_tracer_provider() is before
    assert not list(tmp_path.iterdir())


@given(
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
    st.sampled_from([0, 1]),
    st.sampled_from([TraceState(), TraceState([("a", "1"), ("b", "2")])]),
)
def test_a_context_is_written_as_the_propagator_writes_it(
    trace_id: int, span_id: int, flags: int, state: TraceState
) -> None:
    context = SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(flags), trace_state=state)
    span = NonRecordingSpan(context)
    ours: dict[str, str] = {}
    theirs: dict[str, str] = {}
    tracing.inject(ours, span)
    TraceContextTextMapPropagator().inject(theirs, context=set_span_in_context(span))
    assert ours == theirs
    assert traceparent(span) == theirs.get("traceparent", "")


TRACEPARENTS = st.one_of(
    st.from_regex(r"\A(00|01|ff)-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?\Z"),
    st.tuples(st.sampled_from(["0" * 32, "1" * 32, "A" * 32]), st.sampled_from(["0" * 16, "1" * 16])).map(
        lambda ids: f"00-{ids[0]}-{ids[1]}-01"
    ),
    st.text(max_size=60),
)


@given(TRACEPARENTS, st.sampled_from(["", "a=1", "a=1,b=2", "="]))
def test_a_context_is_read_as_the_propagator_reads_it(parent: str, state: str) -> None:
    carrier = {"traceparent": parent} | ({"tracestate": state} if state else {})
    theirs = get_current_span(TraceContextTextMapPropagator().extract(carrier, context=Context())).get_span_context()
    providers = (
        TracerProvider(sampler=ALWAYS_ON, shutdown_on_exit=False),
        RecordingProvider(Resource({}), SpanProcessor(), records_all=True),
    )
    for provider in providers:
        source = tracing.tracer(provider)
        with tracing.inner_server_span(source, "call", {}, carrier) as span:
            assert span.get_span_context().is_valid == theirs.is_valid
            assert getattr(span.span if isinstance(span, LateSpan) else span, "parent", None) == (
                theirs if theirs.is_valid else None
            )
        with tracing.server_span(source, "call", {}, carrier) as span:
            assert isinstance(span, ReadableSpan | RecordedSpan)
            assert span.parent == (theirs if theirs.is_valid else None)


@given(TRACEPARENTS)
def test_what_passes_for_a_traceparent_is_one(text: str) -> None:
    read = TraceContextTextMapPropagator().extract({"traceparent": text}, context=Context())
    theirs = get_current_span(read).get_span_context()
    assert tracing.context_of(text) == (theirs if theirs.is_valid and text.startswith("00-") else None)
    if tracing.context_of(text) is not None:
        assert numbers(text, remote=True).is_remote
        assert is_sampled(text) == theirs.trace_flags.sampled
        assert traceparent(RemoteSpan(text)) == text


def test_phases_leave_nothing_of_their_span_uncovered_whatever_keeps_the_process_from_its_work() -> None:
    """As a process finds itself that waits for its turn between the span's begin and its first phase's."""

    class Kept(SpanProcessor):
        ended: ClassVar[list[ReadableSpan]] = []

        def on_end(self, span: ReadableSpan) -> None:
            self.ended.append(span)

    source = RecordingProvider(Resource({}), Kept()).get_tracer("test")
    span = source.start_span("whole")
    time.sleep(0.01)
    phases = Phases(source, span)
    with phases.step("first"):
        time.sleep(0.01)
    phases.begin("second")
    phases.note("a", 1)
    phases.end()
    time.sleep(0.01)
    span.end()
    first, second, whole = Kept.ended
    assert [first.name, second.name, whole.name] == ["first", "second", "whole"]
    assert (first.start_time, second.end_time) == (whole.start_time, whole.end_time)
    assert first.end_time == second.start_time
    assert (first.attributes, second.attributes) == ({}, {"a": 1})
    assert is_child(first, whole)
    assert is_child(second, whole)


def test_phases_of_another_sdk_end_when_they_say(provider: TracerProvider, exporter: InMemorySpanExporter) -> None:
    source = provider.get_tracer("test")
    span = source.start_span("whole")
    phases = Phases(source, span)
    with pytest.raises(NotFound), phases.step("only"):
        raise NotFound("gone", reason="GONE")
    phases.end()
    span.end()
    only, whole = exporter.get_finished_spans()
    assert only.start_time == whole.start_time
    assert (only.attributes or {})["error.type"] == "GONE"


def test_nothing_of_a_span_waits_for_the_garbage_collector() -> None:
    """A request makes twenty of them; what forms a circle stays until a full collection, which stops the process."""
    source = RecordingProvider(Resource({}), SpanProcessor()).get_tracer("test")
    gc.collect()
    gc.disable()
    try:
        span = source.start_span("whole")
        phases = Phases(source, span)
        with suppress(NotFound), phases.step("first"):
            raise NotFound("gone", reason="GONE")
        phases.end()
        span.end()
        held = weakref.ref(span)
        del span, phases
        assert held() is None
    finally:
        gc.enable()
