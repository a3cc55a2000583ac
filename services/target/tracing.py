"""What a target tells of one request: where its time went, round by round."""

from __future__ import annotations

from contextvars import Context

from opentelemetry.trace import INVALID_SPAN, NoOpTracer, Span, Tracer

from countersign.services.protocol.writer import Writer
from countersign.services.runtime.reasons import finish_name
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.context import task_context
from countersign.services.runtime.telemetry.phases import Phases
from countersign.services.runtime.telemetry.traceparent import traceparent
from countersign.services.target.passes import Pass
from countersign.v1.commit_pb2 import Closed, Opened
from countersign.v1.sampling_pb2 import Drafting, FinishReason

QUEUE, PREFIX, PREFILL, DECODE, COMMIT = "queue", "prefix", "prefill", "decode", "commit"


class AnswerTrace:
    """The span ``answer`` of one epoch of a request at one target, with a span below it for each of its phases."""

    def __init__(self, tracer: Tracer | None = None, writer: Writer | None = None, instance: str = "") -> None:
        self.span: Span = INVALID_SPAN
        if tracer is not None and writer is not None and writer.log.opened is not None:
            self.span = _begun(tracer, writer, writer.log.opened, instance)
        self._phases = Phases(tracer or NoOpTracer(), self.span)
        self._phases.begin(QUEUE)
        self._rounds = self._drafted = self._accepted = 0
        self._waited = self._longest = 0.0

    @property
    def traceparent(self) -> str:
        """The context of ``answer``, for other services; empty where nothing is traced."""
        return traceparent(self.span)

    def context(self) -> Context:
        """For a task of this request."""
        return task_context(self.span)

    def enters(self, phase: str) -> None:
        """What was before is over."""
        self._phases.begin(phase)

    def found(self, blocks: int) -> None:
        """So many blocks of its prefix need not be computed."""
        self._phases.note(names.CACHED_BLOCKS, blocks)

    def preempted(self) -> None:
        """Its pages went to others; it is computed again later."""
        self.span.add_event("preempted")
        self.enters(QUEUE)

    def committed(self, round_: Pass, seconds: float) -> None:
        """A pass is in the log, ``seconds`` after it was offered."""
        self._rounds += 1
        self._drafted += round_.drafted
        self._accepted += round_.accepted
        self._waited += seconds
        self._longest = max(self._longest, seconds)
        if self.span.is_recording():
            told = {
                names.ROUND_TOKENS: len(round_.token_ids),
                names.ROUND_DRAFTED: round_.drafted,
                names.ROUND_ACCEPTED: round_.accepted,
                names.ROUND_BATCH: round_.timing.batch,
                names.ROUND_TIME: round_.timing.seconds,
                names.ROUND_COMMIT: seconds,
            }
            self.span.add_event(names.ROUND, told, round_.timing.ended_unix_ns)

    def fails(self, reason: str) -> None:
        """It is dropped."""
        tracing.fail(self.span, reason)

    def ended(self, closed: Closed | None) -> None:
        """Its log is closed, or another's."""
        if self.span.is_recording():
            self.span.set_attributes(self._sums())
            if closed is not None:
                self._closed(closed)
        self._phases.end()
        self.span.end()

    def _closed(self, closed: Closed) -> None:
        self.span.set_attribute(names.FINISH_REASONS, (finish_name(closed.reason),))
        if closed.receipt_sha256:
            self.span.set_attribute(names.RECEIPT, closed.receipt_sha256.hex())
        if closed.reason == FinishReason.FINISH_REASON_ERROR:
            tracing.fail(self.span, "FINISHED_WITH_ERROR")

    def _sums(self) -> dict[str, int | float]:
        return {
            names.ROUNDS: self._rounds,
            names.DRAFTED: self._drafted,
            names.ACCEPTED: self._accepted,
            names.COMMIT_MEAN: self._waited / max(self._rounds, 1),
            names.COMMIT_MAX: self._longest,
        }


def _begun(tracer: Tracer, writer: Writer, opened: Opened, instance: str) -> Span:
    if not opened.traceparent:
        return INVALID_SPAN
    told: dict[str, str | int] = {
        names.REQUEST_ID: writer.log.request_id,
        names.INSTANCE: instance,
        names.EPOCH: writer.epoch,
        names.DRAFTING: "off" if opened.drafting == Drafting.DRAFTING_OFF else "model",
    }
    if writer.epoch > 1:
        told[names.KEEP] = True  # it was taken over
    return tracing.begin(tracer, "answer", opened.traceparent, told)
