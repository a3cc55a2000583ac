from __future__ import annotations

from pathlib import Path

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult

from countersign.services.runtime.telemetry import kept
from countersign.services.runtime.telemetry.kept import KeptSpans, read_spans


def write(folder: Path, instance: str, *names: str, size: int = 1 << 20) -> KeptSpans:
    exporter = KeptSpans(folder, instance, size)
    provider = TracerProvider(resource=Resource.create({"service.instance.id": instance}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for name in names:
        with provider.get_tracer("test").start_as_current_span(name):
            pass
    return exporter


def names(folder: Path) -> list[str]:
    return [found.span.name for found in read_spans(folder)]


def test_what_several_processes_wrote_is_read(tmp_path: Path) -> None:
    write(tmp_path, "one", "a", "b")
    write(tmp_path, "two", "c")
    assert sorted(names(tmp_path)) == ["a", "b", "c"]
    (found,) = (found for found in read_spans(tmp_path) if found.span.name == "c")
    assert {each.key: each.value.string_value for each in found.resource.attributes}["service.instance.id"] == "two"


def test_no_more_than_its_size_is_kept_and_the_newest_is(tmp_path: Path) -> None:
    size = 20_000
    write(tmp_path, "one", *(f"span {number}" for number in range(500)), size=size)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= size
    found = names(tmp_path)
    assert "span 499" in found
    assert "span 0" not in found


@pytest.mark.parametrize("cut", [1, 10, 100])
def test_a_file_that_was_cut_off_is_read_as_far_as_it_goes(tmp_path: Path, cut: int) -> None:
    write(tmp_path, "one", "a", "b", "c")
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    assert names(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("data", [b"", b"\xff" * 50, b"\x05\x00\x00\x00\x00\x00", b"\x80" * 20])
def test_what_is_no_such_file_holds_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.otlp").write_bytes(data)
    assert names(tmp_path) == []


def test_a_folder_that_is_gone_costs_spans_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    exporter = KeptSpans(tmp_path / "traces", "one", 1000)
    (tmp_path / "traces").rmdir()
    assert exporter.export([]) is SpanExportResult.FAILURE
    assert exporter.export([]) is SpanExportResult.FAILURE
    assert [record.message for record in caplog.records] == ["spans cannot be kept"]


def test_files_of_dead_processes_go_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "MOST_FILES", 3)
    for number in range(6):
        write(tmp_path, f"process-{number}", "a")
    KeptSpans(tmp_path, "new", 1000)
    assert len(list(tmp_path.iterdir())) == 3
