"""Finished spans as OTLP's bytes (opentelemetry/proto/trace/v1/trace.proto), without message objects.

An exporter's thread that makes message objects keeps the event loop from Python for milliseconds a batch: six times as
long as this. What this writes is held against the SDK's own encoder.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext

_FIXED64 = struct.Struct("<Q").pack
_FIXED32 = struct.Struct("<I").pack
_DOUBLE = struct.Struct("<d").pack

# Flags (field 16 of a span, 6 of a link): it is known whether the parent is of another process; it is.
_HAS_IS_REMOTE, _IS_REMOTE = 0x100, 0x200


def encode(spans: Sequence[ReadableSpan]) -> bytes:
    """An ExportTraceServiceRequest of these spans."""
    grouped: dict[Resource, dict[InstrumentationScope | None, list[ReadableSpan]]] = {}
    for span in spans:
        grouped.setdefault(span.resource, {}).setdefault(span.instrumentation_scope, []).append(span)
    out = []
    for resource, scopes in grouped.items():
        parts = [_field(2, _scope_spans(scope, of_scope)) for scope, of_scope in scopes.items()]
        out.append(_field(1, _field(1, _resource(resource)) + b"".join(parts) + _text(3, resource.schema_url)))
    return b"".join(out)


def length_prefixed(data: bytes) -> bytes:
    """A message after its length, as protobuf streams have it."""
    return _varint(len(data)) + data


def _scope_spans(scope: InstrumentationScope | None, spans: Sequence[ReadableSpan]) -> bytes:
    about = url = b""
    if scope is not None:
        about = _text(1, scope.name) + _text(2, scope.version or "") + _attributes(3, scope.attributes)
        url = _text(3, scope.schema_url or "")
    return _field(1, about) + b"".join([_field(2, _span(span)) for span in spans]) + url


@lru_cache(maxsize=8)
def _resource(resource: Resource) -> bytes:
    return _attributes(1, resource.attributes)


def _span(span: ReadableSpan) -> bytes:
    context, parent = span.context or SpanContext(0, 0, is_remote=False), span.parent
    return b"".join(
        (
            b"\x0a\x10" + context.trace_id.to_bytes(16, "big"),
            b"\x12\x08" + context.span_id.to_bytes(8, "big"),
            _text(3, _state(context)),
            b"\x22\x08" + parent.span_id.to_bytes(8, "big") if parent is not None else b"",
            _name(5, span.name),
            b"\x30" + _varint(span.kind.value + 1),
            b"\x39" + _FIXED64(span.start_time or 0),
            b"\x41" + _FIXED64(span.end_time or 0),
            _attributes(9, span.attributes),
            _number(10, span.dropped_attributes),
            *[_field(11, _event(event)) for event in span.events],
            _number(12, span.dropped_events),
            *[_field(13, _link(link)) for link in span.links],
            _number(14, span.dropped_links),
            _status(span.status.status_code.value, span.status.description or ""),
            b"\x85\x01" + _FIXED32(_flags(parent)),
        )
    )


@lru_cache(maxsize=256)
def _status(code: int, description: str) -> bytes:
    """Descriptions are reasons: there are few."""
    return _field(15, _text(2, description) + _number(3, code))


def _event(event: Event) -> bytes:
    told = _name(2, event.name) + _attributes(3, event.attributes) + _number(4, event.dropped_attributes)
    return b"\x09" + _FIXED64(event.timestamp) + told


def _link(link: Link) -> bytes:
    context = link.context
    return b"".join(
        (
            b"\x0a\x10" + context.trace_id.to_bytes(16, "big"),
            b"\x12\x08" + context.span_id.to_bytes(8, "big"),
            _attributes(4, link.attributes),
            _number(5, link.dropped_attributes),
            b"\x35" + _FIXED32(_flags(context)),
        )
    )


def _state(context: SpanContext) -> str:
    return ",".join([f"{key}={value}" for key, value in context.trace_state.items()]) if context.trace_state else ""


def _flags(context: SpanContext | None) -> int:
    return _HAS_IS_REMOTE | (_IS_REMOTE if context is not None and context.is_remote else 0)


def _attributes(number: int, attributes: Mapping[str, object] | None) -> bytes:
    if not attributes:
        return b""
    out: list[bytes] = []
    for key, value in attributes.items():
        if type(value) is float:
            out += (_double_head(number, key), _DOUBLE(value))
        elif type(value) is int and -1 < value < _RECURS:
            out.append(_number_attribute(number, key, value))
        elif type(value) is str and len(value) < _SHORT_TEXT:
            out.append(_text_attribute(number, key, value))
        else:
            out.append(_attribute(number, key, value))
    return b"".join(out)


def _attribute(number: int, key: str, value: object) -> bytes:
    return _field(number, _key(key) + _field(2, _value(value)))


# What is written again and again: counts of tokens, names of models, reasons and instances. Ids are longer.
_RECURS, _SHORT_TEXT = 256, 30


@lru_cache(maxsize=4096)
def _number_attribute(number: int, key: str, value: int) -> bytes:
    return _attribute(number, key, value)


@lru_cache(maxsize=1024)
def _text_attribute(number: int, key: str, value: str) -> bytes:
    return _attribute(number, key, value)


@lru_cache(maxsize=512)
def _double_head(number: int, key: str) -> bytes:
    """All of an attribute but the eight bytes of its number."""
    return _attribute(number, key, 0.0)[:-8]


@lru_cache(maxsize=1024)
def _key(key: str) -> bytes:
    return _text(1, key)


def _value(value: object) -> bytes:
    """An AnyValue; the text of what is no attribute's type."""
    if isinstance(value, str):
        data = value.encode(errors="replace")
        return b"\x0a" + _varint(len(data)) + data
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int):
        return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    if isinstance(value, float):
        return b"\x21" + _DOUBLE(value)
    if isinstance(value, bytes):
        return b"\x3a" + _varint(len(value)) + value
    if isinstance(value, Sequence):
        return _field(5, b"".join([_field(1, _value(each)) for each in value]))
    if isinstance(value, Mapping):
        return _field(6, _attributes(1, value))
    return _text(1, str(value))


@lru_cache(maxsize=256)
def _name(number: int, name: str) -> bytes:
    """A text that recurs."""
    return _text(number, name)


def _text(number: int, text: str) -> bytes:
    return _field(number, text.encode(errors="replace")) if text else b""


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value) if value else b""


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


_SHORT = [bytes((value,)) for value in range(128)]


def _varint(value: int) -> bytes:
    if value < 128:
        return _SHORT[value]
    if value < 16384:
        return bytes((value & 127 | 128, value >> 7))
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)
