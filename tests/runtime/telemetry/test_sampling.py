from __future__ import annotations

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode, Tracer

from countersign.services.runtime.telemetry.attributes import KEEP
from countersign.services.runtime.telemetry.recording import RecordingProvider
from countersign.services.runtime.telemetry.sampling import Held, KeepingProcessor


class House:
    """One process: what it exports, what it tells the others."""

    def __init__(self, share: float = 0.0) -> None:
        self.exporter = InMemorySpanExporter()
        self.keeping = KeepingProcessor(SimpleSpanProcessor(self.exporter))
        self.told: list[int] = []
        self.keeping.tell = self.told.append
        provider = RecordingProvider(Resource.create({}), self.keeping, share=share, records_all=True)
        self.tracer: Tracer = provider.get_tracer("test")

    @property
    def names(self) -> list[str]:
        return [span.name for span in self.exporter.get_finished_spans()]


@pytest.fixture
def house() -> House:
    return House()


def test_nothing_of_an_unsampled_trace_is_exported(house: House) -> None:
    with house.tracer.start_as_current_span("outer"), house.tracer.start_as_current_span("inner"):
        pass
    assert house.names == []
    assert house.told == []


@pytest.mark.parametrize("how", ["error", "keep"])
def test_a_span_that_matters_brings_out_what_was_held_and_all_that_follows(house: House, how: str) -> None:
    with house.tracer.start_as_current_span("outer") as outer:
        with house.tracer.start_as_current_span("before"):
            pass
        with house.tracer.start_as_current_span("bad") as bad:
            if how == "error":
                bad.set_status(Status(StatusCode.ERROR))
            else:
                bad.set_attribute(KEEP, True)
        assert house.names == ["before", "bad"]
        with house.tracer.start_as_current_span("after"):
            pass
    assert house.names == ["before", "bad", "after", "outer"]
    assert house.told == [outer.get_span_context().trace_id]
    spans = house.exporter.get_finished_spans()
    assert all(span.context is not None and span.context.trace_flags.sampled for span in spans)


def test_other_traces_stay_held(house: House) -> None:
    with house.tracer.start_as_current_span("other"):
        pass
    with house.tracer.start_as_current_span("bad") as bad:
        bad.set_status(Status(StatusCode.ERROR))
    assert house.names == ["bad"]


def test_another_process_keeps_what_it_is_told_to_and_says_nothing_itself() -> None:
    here, there = House(), House()
    with here.tracer.start_as_current_span("here") as span:
        remote = trace.set_span_in_context(trace.NonRecordingSpan(span.get_span_context()))
        with there.tracer.start_as_current_span("there", context=remote) as far:
            far.set_attribute(KEEP, False)
        assert there.names == []
        there.keeping.keep(span.get_span_context().trace_id)
    assert there.names == ["there"]
    assert there.told == []


def test_a_sampled_trace_is_exported_at_once_and_nobody_is_told() -> None:
    house = House(share=1.0)
    with house.tracer.start_as_current_span("bad") as bad:
        bad.set_status(Status(StatusCode.ERROR))
    assert house.names == ["bad"]
    assert house.told == []


def test_whether_a_trace_is_sampled_is_said_where_it_begins() -> None:
    sampled, not_sampled = House(share=1.0), House(share=0.0)
    with sampled.tracer.start_as_current_span("root") as root:
        parent = trace.set_span_in_context(trace.NonRecordingSpan(root.get_span_context()))
        with not_sampled.tracer.start_as_current_span("child", context=parent):
            pass
    assert not_sampled.names == ["child"]


def test_a_share_of_the_traces_is_sampled_by_their_ids() -> None:
    house = House(share=0.25)
    for _ in range(2000):
        with house.tracer.start_as_current_span("root"):
            pass
    assert 380 <= len(house.names) <= 620


def test_what_is_held_has_a_bound_and_a_time() -> None:
    house = House()
    with house.tracer.start_as_current_span("any"):
        pass
    span = house.tracer.start_span("span")
    held = Held(most=3, hold_s=10)
    for number in range(5):
        assert held.ended(number, span, 0.0) == []  # type: ignore[arg-type]
    assert len(held) == 3
    assert held.keep(0) == []
    assert len(held.keep(4) or []) == 1
    held.ended(7, span, 20.0)  # type: ignore[arg-type]
    assert len(held) == 1
    assert held.keep(3) == []


def test_a_trace_is_news_once() -> None:
    held = Held()
    assert held.keep(1) == []
    assert held.keep(1) is None
