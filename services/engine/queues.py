"""Requests as the scheduler keeps them: by priority, by tenant with its virtual counter, by urgency."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

Key: TypeAlias = tuple[int, int, str]


@dataclass(frozen=True, slots=True)
class Request:
    """What the scheduler must know of a request. ``deadline`` in ms on the clock that gives ``now``; ``keys``: those of
    its first full pages, chained, if its pages are shared.
    """

    id: str
    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    deadline: int | None = None
    keys: Sequence[bytes] = ()


@dataclass(slots=True, eq=False)
class Share:
    """A tenant's part of one priority: its virtual counter, how many requests it has, the keys of those waiting."""

    tenant: str
    counter: int = 0
    members: int = 0
    queue: list[Key] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Level:
    """The requests of one priority. ``last``: the tenant whose queue was the last to become empty."""

    priority: int
    served: int
    members: int = 0
    shares: dict[str, Share] = field(default_factory=dict)
    waiting: dict[str, Share] = field(default_factory=dict)
    last: Share | None = None

    def push(self, entry: Entry, tick: int) -> None:
        """Let it wait."""
        share = entry.share
        if not share.queue:
            if not self.waiting:
                self.served = tick
            self._lift(share)
            self.waiting[share.tenant] = share
        insort(share.queue, entry.key)

    def pull(self, entry: Entry) -> None:
        """It waits no more."""
        share = entry.share
        del share.queue[bisect_left(share.queue, entry.key)]
        if not share.queue:
            del self.waiting[share.tenant]
            self.last = share

    def head(self) -> str:
        """Who is admitted next."""
        return min(self.waiting.values(), key=lambda share: (share.counter, share.queue[0])).queue[0][2]

    def _lift(self, share: Share) -> None:
        """Time in which a tenant wanted nothing is not saved up; a tenant that would be lifted anyhow is forgotten."""
        idle = self.last.counter if self.last is not None else 0
        floor = min((other.counter for other in self.waiting.values()), default=idle)
        share.counter = max(share.counter, floor)
        for other in [other for other in self.shares.values() if not other.members and other.counter <= floor]:
            del self.shares[other.tenant]


@dataclass(slots=True, eq=False)
class Entry:
    """A request's state. ``key``: its place in its tenant's queue (urgency, arrival, id); ``due``: the same of its
    deadline; ``senior``: sorts the most senior first (aged priority, priority, arrival); ``published``: of how many of
    its first pages others know.
    """

    request: Request
    id: str
    level: Level
    share: Share
    key: Key
    due: Key | None
    senior: tuple[int, int, int]
    known: int
    computed: int = 0
    published: int = 0
    running: bool = False
    held: bool = False
    charged: bool = False
