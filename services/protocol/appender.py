"""One append in flight against one log, and what its every ending means.

Compare-and-set makes an append safe to repeat: the stream takes it only right after the record that its writer saw
last, so it is stored at most once however often it is sent. That leaves three endings:

    acked       stored
    refused     another record is last: read the tail. Either the append itself got there before its repetition, or
                somebody else's record did and says what to do now
    ack_lost    nobody knows: read the tail. The append may be there, or another record, or nothing: then send it again
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from countersign.services.protocol.commit import Entry, LogState, Payload, encode
from countersign.services.protocol.errors import AppendInFlight, NothingInFlight
from countersign.services.protocol.events import Append, Effect, ReadTail


class Appender(ABC):
    """Base of all that writes to a log. Mutable; its log state is not."""

    def __init__(self, log: LogState) -> None:
        self._log = log
        self._in_flight: Append | None = None

    @property
    def log(self) -> LogState:
        """The log as far as this machine knows it: only what the stream has stored."""
        return self._log

    @property
    def in_flight(self) -> Append | None:
        """The append whose ending is not known yet."""
        return self._in_flight

    def acked(self, sequence: int) -> Effect:
        """The append in flight is stored as number ``sequence``.

        Raises:
            NothingInFlight: there is none.
        """
        append = self._sent()
        self._log = self._log.apply(sequence, append.data)
        self._in_flight = None
        self._stored()
        return self._go_on()

    def refused(self, entries: Iterable[Entry]) -> Effect:
        """The append in flight was refused; ``entries`` were read since, after ``log.sequence``.

        Raises:
            NothingInFlight: there is none.
            LogError: the log is not as the protocol says; ``log`` is the state before the bad record.
        """
        self._sent()
        known = self._log.sequence
        effect = self.tail(entries)
        if self._log.sequence == known:
            # Something was last and yet was not read: the replica that answered lags behind.
            return ReadTail(known)
        return effect

    def ack_lost(self) -> ReadTail:
        """Nobody knows whether the append in flight is stored.

        Raises:
            NothingInFlight: there is none.
        """
        self._sent()
        return ReadTail(self._log.sequence)

    def tail(self, entries: Iterable[Entry]) -> Effect:
        """``entries`` are the records after ``log.sequence``, as far as they were read; known ones are skipped.

        Raises:
            LogError: the log is not as the protocol says; ``log`` is the state before the bad record.
        """
        for entry in entries:
            if entry.sequence <= self._log.sequence:
                continue
            before, self._log = self._log, self._log.apply(entry.sequence, entry.data)
            if self._is_own(entry):
                self._in_flight = None
                self._stored()
            else:
                self._overtaken(before)
        return self._go_on()

    def _append(self, payload: Payload) -> Append:
        """Puts ``payload`` in flight after the last record seen; the same payload there gives the same bytes."""
        self._log.check(payload)
        self._in_flight = Append(self._log.sequence, encode(self._log.request_id, self._log.digest, payload))
        return self._in_flight

    def _is_own(self, entry: Entry) -> bool:
        # Equal bytes stand at one place only: they name the record before them.
        return self._in_flight is not None and entry.data == self._in_flight.data

    def _sent(self) -> Append:
        if self._in_flight is None:
            raise NothingInFlight("no append is in flight", request_id=self._log.request_id)
        return self._in_flight

    def _must_be_idle(self) -> None:
        if self._in_flight is not None:
            raise AppendInFlight("one append at a time", expected=self._in_flight.expected)

    @abstractmethod
    def _stored(self) -> None:
        """The append that was in flight is in the log, as its last record."""

    @abstractmethod
    def _overtaken(self, before: LogState) -> None:
        """Somebody else's record is the log's last; ``before`` is the state before it."""

    @abstractmethod
    def _go_on(self) -> Effect:
        """What follows from the log as it is now: the same append again, the next one, a stop, or nothing."""
