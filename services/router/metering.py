"""What a router counts of each request, as its client sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from countersign.services.runtime.errors import CountersignError, DataLoss, DeadlineExceeded, Internal, Unavailable
from countersign.services.runtime.reasons import finish_name
from countersign.services.runtime.telemetry import attributes as names
from countersign.services.runtime.telemetry import metrics
from countersign.services.runtime.telemetry.instruments import Meter
from countersign.v1.router_pb2 import Finished, StreamEvent
from countersign.v1.sampling_pb2 import FinishReason

# Finish reasons that are failures, as error.type has them.
_FAILURES = {
    FinishReason.FINISH_REASON_ERROR: "FINISHED_WITH_ERROR",
    FinishReason.FINISH_REASON_DEADLINE: "DEADLINE_EXCEEDED",
}

# What is not the request's fault, though it is not in the log yet: no target, no tokenizer, no bus.
_OURS = (Unavailable, DeadlineExceeded, DataLoss, Internal)


class RequestMeter:
    """A router's instruments. ``clock`` gives seconds and never goes back, such as a loop's."""

    def __init__(self, clock: Callable[[], float], meter: Meter | None = None) -> None:
        self.clock = clock
        self.duration = metrics.histogram(metrics.REQUEST_DURATION, meter)
        self.first = metrics.histogram(metrics.TIME_TO_FIRST_TOKEN, meter)
        self.each = metrics.histogram(metrics.TIME_PER_OUTPUT_TOKEN, meter)
        self.tokens = metrics.histogram(metrics.REQUEST_TOKENS, meter)
        self.ended = metrics.counter(metrics.REQUESTS, meter)

    @contextmanager
    def request(self) -> Iterator[Measured]:
        """From the arrival of a request to its end, whatever that is."""
        measured = Measured(self)
        try:
            yield measured
        except CountersignError as error:
            failed = measured.accepted or isinstance(error, _OURS)
            measured.ends("failed" if failed else "refused", error.reason)
            raise
        except Exception:
            measured.ends("failed", Internal.default_reason)
            raise
        finally:
            measured.ends("left")  # else its call was cancelled, or its stream closed


class Measured:
    """One request."""

    def __init__(self, meter: RequestMeter) -> None:
        self._meter = meter
        self._began = meter.clock()
        self._first: float | None = None
        self._told = self._over = False
        self._asked: dict[str, str] = {
            metrics.OPERATION: names.TEXT_COMPLETION,
            metrics.PROVIDER: names.PROVIDER_NAME,
        }

    @property
    def accepted(self) -> bool:
        """It is in the log, so that its model is one that is served here: what a client names is no label."""
        return metrics.MODEL in self._asked

    def saw(self, event: StreamEvent) -> None:
        """What the client gets next."""
        match event.WhichOneof("event"):
            case "accepted":
                self._asked[metrics.MODEL] = event.accepted.model
            case "tokens" | "hidden":
                if self._first is None:
                    self._first = self._meter.clock()  # told with the next event: nothing keeps this one
                else:
                    self._tell_first()
            case "finished":
                self._finished(event.finished)

    def ends(self, how: str, error: str = "") -> None:
        """Once; the first time stands."""
        if self._over:
            return
        self._over = True
        self._tell_first()
        model = {metrics.MODEL: self._asked[metrics.MODEL]} if self.accepted else {}
        self._meter.ended.add(1, {**model, metrics.FINISH: how})
        failed = {metrics.ERROR: error} if error else {}
        self._meter.duration.record(self._meter.clock() - self._began, {**self._asked, **failed})

    def _tell_first(self) -> None:
        """Once, if there was one."""
        if self._first is not None and not self._told:
            self._told = True
            self._meter.first.record(self._first - self._began, self._asked)

    def _finished(self, finished: Finished) -> None:
        now, usage, model = self._meter.clock(), finished.usage, self._asked.get(metrics.MODEL, "")
        if self._first is not None and usage.output_tokens > 1:
            self._meter.each.record((now - self._first) / (usage.output_tokens - 1), self._asked)
        for kind, tokens in (("input", usage.prompt_tokens), ("output", usage.output_tokens)):
            self._meter.tokens.record(tokens, {metrics.MODEL: model, metrics.TOKEN_TYPE: kind})
        reason = finish_name(finished.reason)
        self.ends(reason, _FAILURES.get(finished.reason, ""))
