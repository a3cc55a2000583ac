"""Reading a log as it grows: what a router streams to its client."""

from __future__ import annotations

from countersign.services.protocol.commit import LogState
from countersign.services.protocol.events import AssignedTo, CancelledByClient, Committed, Ended, Event


class Reader:
    """Turns the records of one log into what happened, checking each.

    Give it every record from the first on: the hash chain then shows a gap, whatever the transport says. A record that
    was seen already is skipped, so that redelivery does no harm. ``start`` is the number of output tokens that the
    client has.
    """

    def __init__(self, request_id: str, *, start: int = 0) -> None:
        self._log = LogState(request_id)
        self._start = start

    @property
    def log(self) -> LogState:
        """The log as far as it was read; read on after ``log.sequence``."""
        return self._log

    def entry(self, sequence: int, data: bytes) -> list[Event]:
        """What the record ``data`` tells, stored as number ``sequence``.

        Raises:
            BrokenChain: records are missing before this one; the state stays, so read again after ``log.sequence``.
            LogError: the record may not stand where it stands.
        """
        if sequence <= self._log.sequence:
            return []
        before, self._log = self._log, self._log.apply(sequence, data)
        return [*self._committed(before), *_turns(before, self._log)]

    def _committed(self, before: LogState) -> list[Event]:
        position = max(len(before.tokens), self._start)
        if position >= len(self._log.tokens):
            return []
        accepted = sum(self._log.tokens.proposed(position))
        return [Committed(position, self._log.tokens.ids(position), accepted)]


def _turns(before: LogState, after: LogState) -> list[Event]:
    if after.epoch > before.epoch:
        return [AssignedTo(after.epoch, after.instance)]
    if after.cancelled is not None and before.cancelled is None:
        return [CancelledByClient(after.cancelled.cause)]
    if after.closed is not None:
        end = after.closed
        return [Ended(end.reason, end.usage, end.receipt_sha256, end.message)]
    return []
