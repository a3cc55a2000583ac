"""Carries out a machine's effects against a store of logs: NATS in a service, a simulator in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

from countersign.services.protocol.appender import Appender
from countersign.services.protocol.commit import Entry
from countersign.services.protocol.events import (
    Append,
    AssignedTo,
    CancelledByClient,
    ClosedAlready,
    Effect,
    Fenced,
    ReadTail,
    Settled,
)
from countersign.services.protocol.subjects import commit_subject

Final = Settled | Fenced | ClosedAlready | CancelledByClient | AssignedTo


class LogStore(Protocol):
    """What a machine's effects need of the outside."""

    async def try_append(self, subject: str, data: bytes, *, expected: int) -> int | Literal["refused", "lost"]:
        """The new record's sequence; "refused" when another record is last; "lost" when nobody knows."""
        ...

    async def read(self, subject: str, *, after: int = 0) -> Sequence[Entry]:
        """All records of the subject after that sequence, in order."""
        ...


async def settle(machine: Appender, effect: Effect | None, store: LogStore) -> Final:
    """Do what ``machine`` asks until nothing is in flight; what it came to. ``None`` is nothing to do.

    An error of the store goes through: the machine still knows what is in flight, so ``settle(machine,
    ReadTail(machine.log.sequence), store)`` goes on from there.

    Raises:
        LogError: the log is not as the protocol says.
    """
    subject = commit_subject(machine.log.request_id)
    while True:
        match effect:
            case None:
                return Settled()
            case Append(expected, data):
                answer = await store.try_append(subject, data, expected=expected)
                if isinstance(answer, int):
                    effect = machine.acked(answer)
                elif answer == "lost":
                    effect = machine.ack_lost()
                else:
                    effect = machine.refused(await store.read(subject, after=machine.log.sequence))
            case ReadTail(after):
                effect = machine.tail(await store.read(subject, after=after))
            case _:
                return effect
