"""Which traces are kept: a share of them by their ids, and of the others those in which something went wrong.

Spans of the others are recorded too and held for a while. As soon as one says that it matters (an error, a take-over, a
failed audit), all that is held of its trace is exported, here and, by a word over the bus, in every other process.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.trace import SpanContext, StatusCode, TraceFlags

from countersign.services.runtime.telemetry.attributes import KEEP

HOLD_S = 120.0
MOST_HELD = 8192
MOST_KEPT = 8192


class Held:
    """Spans of traces that nobody wants yet, the oldest let go first. Pure; ``now`` in seconds."""

    def __init__(self, *, most: int = MOST_HELD, hold_s: float = HOLD_S) -> None:
        self._most, self._hold_s = most, hold_s
        self._traces: OrderedDict[int, tuple[float, list[ReadableSpan]]] = OrderedDict()
        self._kept: OrderedDict[int, None] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def ended(self, trace_id: int, span: ReadableSpan, now: float) -> list[ReadableSpan]:
        """What of it to export: the span itself where its trace is kept, else nothing."""
        if trace_id in self._kept:
            return [span]
        self._traces.setdefault(trace_id, (now, []))[1].append(span)
        self._count += 1
        while self._traces and (self._count > self._most or self._oldest() < now - self._hold_s):
            self._count -= len(self._traces.popitem(last=False)[1][1])
        return []

    def keep(self, trace_id: int) -> list[ReadableSpan] | None:
        """From now on the trace is kept: what was held of it; None where it was kept before."""
        if trace_id in self._kept:
            return None
        self._kept[trace_id] = None
        while len(self._kept) > MOST_KEPT:
            self._kept.popitem(last=False)
        _, spans = self._traces.pop(trace_id, (0.0, []))
        self._count -= len(spans)
        return spans

    def _oldest(self) -> float:
        return next(iter(self._traces.values()))[0]


class KeepingProcessor(SpanProcessor):
    """Hands sampled spans on to ``export`` and holds the others; ``tell`` is called with the id of each trace that this
    process keeps, from whatever thread ends its span.
    """

    def __init__(self, export: SpanProcessor) -> None:
        self._export = export
        self._held = Held()
        self._lock = threading.Lock()
        self.tell: Callable[[int], None] = lambda _: None

    def on_end(self, span: ReadableSpan) -> None:
        context = span.context
        if context is None or context.trace_flags.sampled:
            self._export.on_end(span)
            return
        with self._lock:
            out = self._held.ended(context.trace_id, span, time.monotonic())
        self._hand_on(out)
        if _matters(span) and self.keep(context.trace_id):
            self.tell(context.trace_id)

    def keep(self, trace_id: int) -> bool:
        """Export what is held of a trace, and all that comes; whether that is news."""
        with self._lock:
            out = self._held.keep(trace_id)
        self._hand_on(out or [])
        return out is not None

    def shutdown(self) -> None:
        self._export.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._export.force_flush(timeout_millis)

    def _hand_on(self, spans: Sequence[ReadableSpan]) -> None:
        for span in spans:
            self._export.on_end(_sampled(span))


def _matters(span: ReadableSpan) -> bool:
    return span.status.status_code is StatusCode.ERROR or bool((span.attributes or {}).get(KEEP))


def _sampled(span: ReadableSpan) -> ReadableSpan:
    """The same span, with the flag that exporters go by."""
    context = span.context
    if context is not None:
        flags = TraceFlags(context.trace_flags | TraceFlags.SAMPLED)
        context = SpanContext(context.trace_id, context.span_id, context.is_remote, flags, context.trace_state)
    return ReadableSpan(
        name=span.name,
        context=context,
        parent=span.parent,
        resource=span.resource,
        attributes=span.attributes,
        events=span.events,
        links=span.links,
        kind=span.kind,
        status=span.status,
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )
