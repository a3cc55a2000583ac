"""Tells who watches what the parties of the commit protocol do: ``event.proto``, on ``cs.v1.event.commit``.

What `Announcer.announce` is given is on the connection before what it announces, so that who sees the one has been sent
the other, even if this process is killed in between. What nobody's step rests on may wait for more of its kind: `soon`.
Events that a broken connection keeps back go out, in order, with the next ones.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import Any, Protocol

from countersign.services.runtime.background import Background
from countersign.services.runtime.errors import CountersignError
from countersign.v1.event_pb2 import ProtocolEvent, ProtocolEvents

EVENTS = "cs.v1.event.commit"
_MOST_WAITING = 10_000
_MOST_AT_ONCE = 500
_SOON_S = 0.02

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
        self._timer: asyncio.TimerHandle | None = None
        self._sending = asyncio.Lock()
        self._background = Background()

    def party(self, request_id: str) -> Party:
        """A new one."""
        return Party(request_id, f"{self._instance}.{next(self._parties)}")

    async def announce(self, *events: ProtocolEvent) -> None:
        """Say it, and first what still waits, in this order; never fails."""
        if self._bus is None or not (events or self._waiting):
            return
        self._waiting += events
        try:
            async with self._sending:
                while self._waiting:
                    part = self._waiting[:_MOST_AT_ONCE]
                    await self._bus.publish(EVENTS, ProtocolEvents(events=part).SerializeToString(), {})
                    del self._waiting[: len(part)]
        except CountersignError as error:
            _log.debug("events wait for the bus", extra={"waiting": len(self._waiting), "reason": error.reason})
        self._bound()

    def soon(self, *events: ProtocolEvent) -> None:
        """Say it within some milliseconds, together with others."""
        if self._bus is None:
            return
        self._waiting += events
        self._bound()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_SOON_S, self._now)

    def _now(self) -> None:
        self._timer = None
        self._background.spawn(self.announce())

    def _bound(self) -> None:
        if excess := max(0, len(self._waiting) - _MOST_WAITING):
            del self._waiting[:excess]
            self.lost += excess
            _log.warning("protocol events were lost", extra={"lost": self.lost})


NOBODY = Announcer(None, "")
"""Says nothing."""
