"""Tells who watches what the parties of the commit protocol do: ``event.proto``, on ``cs.v1.event.commit``.

An event is written to the connection before what it announces, so that who sees the one has been sent the other, even
if this process is killed in between. Events that a broken connection keeps back go out, in order, with the next ones.
"""

from __future__ import annotations

import itertools
import logging
from typing import Any, Protocol

from countersign.services.runtime.errors import CountersignError
from countersign.v1.event_pb2 import ProtocolEvent, ProtocolEvents

EVENTS = "cs.v1.event.commit"
_MOST_WAITING = 10_000
_MOST_AT_ONCE = 500

_log = logging.getLogger(__name__)


class Publisher(Protocol):
    """What it needs of the bus."""

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None: ...


class Party:
    """One piece of work on a request: an epoch at a target, a client at a router. Numbers what it says."""

    def __init__(self, request_id: str = "", name: str = "") -> None:
        self._request_id, self._name, self._number = request_id, name, 0

    def says(self, known: int, **what: Any) -> ProtocolEvent:
        """The next event: ``known`` is the sequence of the last record that was read, ``what`` one kind of event."""
        self._number += 1
        return ProtocolEvent(request_id=self._request_id, party=self._name, number=self._number, known=known, **what)


class Announcer:
    """The events of one process. ``lost`` counts those that could not be kept through an outage."""

    def __init__(self, bus: Publisher | None, instance: str) -> None:
        self.lost = 0
        self._bus, self._instance = bus, instance
        self._parties = itertools.count(1)
        self._waiting: list[ProtocolEvent] = []

    def party(self, request_id: str) -> Party:
        """A new one."""
        return Party(request_id, f"{self._instance}.{next(self._parties)}")

    async def announce(self, *events: ProtocolEvent) -> None:
        """Say it, in this order; never fails."""
        if self._bus is None:
            return
        self._waiting += events
        try:
            while self._waiting:
                part = self._waiting[:_MOST_AT_ONCE]
                await self._bus.publish(EVENTS, ProtocolEvents(events=part).SerializeToString(), {})
                del self._waiting[: len(part)]
        except CountersignError as error:
            _log.debug("events wait for the bus", extra={"waiting": len(self._waiting), "reason": error.reason})
        if excess := max(0, len(self._waiting) - _MOST_WAITING):
            del self._waiting[:excess]
            self.lost += excess
            _log.warning("protocol events were lost", extra={"lost": self.lost})


NOBODY = Announcer(None, "")
"""Says nothing."""
