"""The router's side of the commit protocol: opens a request, assigns it to a target, cancels it, closes an orphan."""

from __future__ import annotations

from countersign.services.protocol.appender import Appender
from countersign.services.protocol.commit import LogState
from countersign.services.protocol.errors import RequestIdTaken
from countersign.services.protocol.events import AssignedTo, CancelledByClient, ClosedAlready, Effect, Settled
from countersign.v1.commit_pb2 import Assigned, Cancelled, Closed, Opened
from countersign.v1.sampling_pb2 import FINISH_REASON_CANCELLED, FinishReason

Wanted = Opened | Assigned | Cancelled | Closed


class Opener(Appender):
    """Appends what a router may append, one at a time, and tries again while that still makes sense.

    Each call gives the append to make, or its answer at once when the log already has one. Any number of routers may do
    this for one request. Begin with ``LogState(request_id)`` for a new request, or with the log as it was read.
    """

    def __init__(self, log: LogState) -> None:
        super().__init__(log)
        self._wanted: Wanted | None = None
        self._epoch = 0

    def open(self, opened: Opened) -> Effect:
        """Opens the request. ``Settled`` once the log begins with ``opened`` or asks the same: a client's retry.

        Raises:
            AppendInFlight: the append before is not settled.
            RequestIdTaken: the log begins with another question; ``tail`` and ``refused`` raise it too.
        """
        return self._want(opened)

    def assign(self, instance: str, arithmetic: str = "") -> Effect:
        """Moves the request to ``instance``, which fences its owner. Other answers: ``AssignedTo`` when another router
        was first, ``CancelledByClient``, ``ClosedAlready``.

        Raises:
            AppendInFlight: the append before is not settled.
            NotOpened: the log is empty.
        """
        return self._want(Assigned(epoch=self._log.epoch + 1, instance=instance, arithmetic=arithmetic))

    def cancel(self, cause: str) -> Effect:
        """Cancels the request: no token is committed after it. ``Settled`` when it is cancelled, by whomever;
        ``ClosedAlready`` when it had ended before.

        Raises:
            AppendInFlight: the append before is not settled.
            NotOpened: the log is empty.
        """
        return self._want(Cancelled(cause=cause))

    def close(self, reason: FinishReason.ValueType, message: str = "") -> Effect:
        """Closes, without a receipt, a log on which no target works: it is assigned to the router itself, or cancelled
        and its target is gone. Other answers: ``ClosedAlready``, ``CancelledByClient`` when that came first,
        ``AssignedTo`` when another router has found a target.

        Raises:
            AppendInFlight: the append before is not settled.
            NotOpened: the log is empty.
        """
        return self._want(Closed(reason=reason, message=message))

    def _want(self, payload: Wanted) -> Effect:
        self._must_be_idle()
        self._wanted, self._epoch = payload, self._log.epoch
        return self._go_on()

    def _stored(self) -> None:
        """The answer follows from the log alone."""

    def _overtaken(self, before: LogState) -> None:
        """The answer follows from the log alone."""

    def _go_on(self) -> Effect:
        if self._wanted is None:
            return Settled()
        answer = self._answer(self._wanted)
        if answer is None:
            if isinstance(self._wanted, Closed):
                self._wanted.usage.CopyFrom(self._log.usage())
            return self._append(self._wanted)
        # An append that is given up here may still arrive; the stream will refuse it, since another record is last.
        self._wanted, self._in_flight = None, None
        return answer

    def _answer(self, wanted: Wanted) -> Effect | None:
        log = self._log
        match wanted:
            case Opened():
                return self._answer_open(wanted)
            case Cancelled() if log.cancelled is not None:
                return Settled()
            case Closed() if log.closed == wanted:
                return Settled()
        if log.closed is not None:
            return ClosedAlready(log.closed.reason)
        if isinstance(wanted, Closed) and log.epoch > self._epoch:
            return AssignedTo(log.epoch, log.instance)
        if isinstance(wanted, Closed) and wanted.reason == FINISH_REASON_CANCELLED and log.cancelled is not None:
            return None
        if log.cancelled is not None:
            return CancelledByClient(log.cancelled.cause)
        if isinstance(wanted, Assigned) and log.epoch >= wanted.epoch:
            mine = (log.epoch, log.instance) == (wanted.epoch, wanted.instance)
            return Settled() if mine else AssignedTo(log.epoch, log.instance)
        return None

    def _answer_open(self, wanted: Opened) -> Effect | None:
        if self._log.opened is None:
            return None
        if asks_the_same(self._log.opened, wanted):
            return Settled()
        self._wanted, self._in_flight = None, None
        raise RequestIdTaken("the request id names another request", request_id=self._log.request_id)


def asks_the_same(one: Opened, other: Opened) -> bool:
    """Whether two questions differ at most in what a router adds: a client that repeats its call asks later."""
    return _question(one) == _question(other)


def _question(opened: Opened) -> Opened:
    copy = Opened()
    copy.CopyFrom(opened)
    copy.ClearField("opened_unix_ms")
    copy.ClearField("deadline_unix_ms")
    copy.ClearField("salt_key")
    copy.ClearField("traceparent")
    return copy
