"""Spans that stay on this machine: files of OTLP messages, each after its length, in two halves that take turns.

A process writes below ``data_dir/traces`` to ``<instance>.otlp``; when that is half of what it may take it becomes
``<instance>.1.otlp``, and what was there before is gone. `read_spans` reads what all processes left, dead ones too.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from google.protobuf import proto
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from countersign.services.runtime.telemetry.encoding import encode, length_prefixed

FOLDER = "traces"
SUFFIX = ".otlp"
# Files of processes that are gone: the newest stay.
MOST_FILES = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class KeptSpan:
    """A span, and of which process it is (``service.name``, ``service.instance.id``)."""

    resource: Resource
    span: Span


class KeptSpans(SpanExporter):
    """Writes spans to ``folder``, at most ``size`` bytes a process. A disk that fails costs spans, never a request."""

    def __init__(self, folder: Path, instance: str, size: int) -> None:
        self._now, self._before = folder / f"{instance}{SUFFIX}", folder / f"{instance}.1{SUFFIX}"
        self._half = size // 2
        self._failed = False
        folder.mkdir(parents=True, exist_ok=True)
        _forget_old(folder)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        data = length_prefixed(encode(spans))
        try:
            if self._now.exists() and self._now.stat().st_size + len(data) > self._half:
                self._now.replace(self._before)
            with self._now.open("ab") as file:
                file.write(data)
        except OSError as error:
            if not self._failed:
                _log.warning("spans cannot be kept", extra={"file": str(self._now), "error": str(error)})
            self._failed = True
            return SpanExportResult.FAILURE
        self._failed = False
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held."""


def read_spans(folder: Path) -> Iterator[KeptSpan]:
    """All that is kept below ``data_dir/traces``, in no order. A message that was cut off ends its file."""
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        for request in _messages(file):
            for group in request.resource_spans:
                for scope in group.scope_spans:
                    for span in scope.spans:
                        yield KeptSpan(group.resource, span)


def _messages(file: Path) -> Iterator[ExportTraceServiceRequest]:
    try:
        data = io.BytesIO(file.read_bytes())
    except OSError:
        return  # it was replaced between the look and the reading
    with suppress(DecodeError):  # cut off by a crash
        while (message := proto.parse_length_prefixed(ExportTraceServiceRequest, data)) is not None:
            yield message


def _forget_old(folder: Path) -> None:
    files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime, reverse=True)
    for file in files[MOST_FILES:]:
        file.unlink(missing_ok=True)
