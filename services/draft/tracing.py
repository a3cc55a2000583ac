"""What a draft tells of each request: one span from its first proposals to its end, not one a call."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from opentelemetry.trace import Span, Tracer

from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.v1.draft_pb2 import DraftSequence, Proposal

# Of targets that died nobody tells the end: then the oldest ends.
MOST = 1024


@dataclass(slots=True)
class _Drafted:
    span: Span
    calls: int = 0
    proposed: int = 0
    busy_s: float = 0.0
    until_unix_ns: int = 0


class DraftSpans:
    """The open spans, by request."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._open: OrderedDict[str, _Drafted] = OrderedDict()

    def asked(self, sequences: Sequence[DraftSequence]) -> None:
        """Those that come with a context begin."""
        for sequence in sequences:
            if not sequence.traceparent:
                continue
            self.ended(sequence.request_id)
            span = tracing.begin(self._tracer, "draft", sequence.traceparent, {names.REQUEST_ID: sequence.request_id})
            self._open[sequence.request_id] = _Drafted(span)
            if len(self._open) > MOST:
                self.ended(next(iter(self._open)))

    def answered(self, proposals: Sequence[Proposal], seconds: float) -> None:
        """A call for several requests took so long."""
        now = time.time_ns()
        for proposal in proposals:
            drafted = self._open.get(proposal.request_id)
            if drafted is not None:
                drafted.calls += 1
                drafted.proposed += len(proposal.tokens.ids)
                drafted.busy_s += seconds
                drafted.until_unix_ns = now

    def ended(self, request_id: str) -> None:
        """The request's target has no more to ask."""
        drafted = self._open.pop(request_id, None)
        if drafted is not None:
            drafted.span.set_attributes(
                {
                    names.DRAFT_CALLS: drafted.calls,
                    names.DRAFTED: drafted.proposed,
                    names.DRAFT_BUSY: drafted.busy_s,
                }
            )
            drafted.span.end(drafted.until_unix_ns or None)

    def close(self) -> None:
        """All end."""
        for request_id in list(self._open):
            self.ended(request_id)
