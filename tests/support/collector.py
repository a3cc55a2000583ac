"""An OpenTelemetry collector for tests: the services of ``opentelemetry-proto``, which keep what they are sent."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span


@dataclass(frozen=True, slots=True)
class Seen:
    """A span that came in, and the service that it is of."""

    service: str
    span: Span

    @property
    def name(self) -> str:
        return self.span.name

    @property
    def attributes(self) -> dict[str, Any]:
        return values(self.span.attributes)


@dataclass(slots=True)
class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """``endpoint`` takes OTLP over gRPC. ``raw`` is all that came, as it came."""

    spans: list[Seen] = field(default_factory=list)
    raw: list[bytes] = field(default_factory=list)
    endpoint: str = ""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def Export(self, request: ExportTraceServiceRequest, context: object) -> ExportTraceServiceResponse:
        with self._lock:
            self.raw.append(request.SerializeToString())
            for group in request.resource_spans:
                service = values(group.resource.attributes)["service.name"]
                self.spans += [Seen(service, span) for scope in group.scope_spans for span in scope.spans]
        return ExportTraceServiceResponse()

    def traces(self) -> dict[bytes, list[Seen]]:
        """The spans by trace."""
        found: dict[bytes, list[Seen]] = defaultdict(list)
        with self._lock:
            for seen in self.spans:
                found[seen.span.trace_id].append(seen)
        return found

    def awaits(self, name: str, attributes: Mapping[str, Any] | None = None, patience_s: float = 60.0) -> Seen:
        """The first span of that name that has these attributes."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until:
            with self._lock:
                spans = [seen for seen in self.spans if seen.name == name]
            for seen in spans:
                if all(seen.attributes.get(key) == value for key, value in (attributes or {}).items()):
                    return seen
            time.sleep(0.05)
        pytest.fail(f"no span {name!r} came within {patience_s:g} s")

    def settled(self, quiet_s: float = 3.0, patience_s: float = 60.0) -> dict[bytes, list[Seen]]:
        """The traces, once nothing has come for a while."""
        until, count, since = time.monotonic() + patience_s, -1, time.monotonic()
        while time.monotonic() < until and (len(self.spans) != count or time.monotonic() - since < quiet_s):
            if len(self.spans) != count:
                count, since = len(self.spans), time.monotonic()
            time.sleep(0.1)
        return self.traces()


@contextmanager
def collector() -> Iterator[Collector]:
    """One over gRPC, on a free port."""
    found = Collector()
    server = grpc.server(ThreadPoolExecutor(4))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(found, server)  # type: ignore[no-untyped-call]
    found.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield found
    finally:
        server.stop(None).wait()


@contextmanager
def http_collector() -> Iterator[Collector]:
    """One over HTTP, on a free port."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/traces":
                found.Export(ExportTraceServiceRequest.FromString(body), None)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield found
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def values(attributes: Iterable[KeyValue]) -> dict[str, Any]:
    """Attributes as Python has them."""
    return {attribute.key: _value(attribute.value) for attribute in attributes}


def roots(trace: Iterable[Seen]) -> list[Seen]:
    """The spans without parent."""
    return [seen for seen in trace if not seen.span.parent_span_id]


def orphans(trace: Iterable[Seen]) -> list[Seen]:
    """The spans whose parent never came."""
    trace = list(trace)
    known = {seen.span.span_id for seen in trace}
    return [seen for seen in trace if seen.span.parent_span_id and seen.span.parent_span_id not in known]


def children(trace: Iterable[Seen], parent: Seen) -> list[Seen]:
    """The spans directly below ``parent``."""
    return [seen for seen in trace if seen.span.parent_span_id == parent.span.span_id]


def covered(whole: Seen, parts: Iterable[Seen]) -> float:
    """The share of a span's time in which at least one of ``parts`` runs."""
    begin, end = whole.span.start_time_unix_nano, whole.span.end_time_unix_nano
    spans = sorted((part.span.start_time_unix_nano, part.span.end_time_unix_nano) for part in parts)
    inside, at = 0, begin
    for start, stop in spans:
        inside += max(0, min(stop, end) - max(start, at))
        at = max(at, min(stop, end))
    return inside / max(end - begin, 1)


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
