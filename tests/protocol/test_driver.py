"""The driver carries out what the machines ask, through refusals, lost acknowledgements and errors of the store."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest

from countersign.services.protocol.commit import LogState, replay
from countersign.services.protocol.driver import settle
from countersign.services.protocol.events import CancelledByClient, Fenced, ReadTail, Settled
from countersign.services.protocol.opener import Opener
from countersign.services.protocol.subjects import commit_subject
from countersign.services.protocol.writer import Writer
from countersign.v1.commit_pb2 import Opened
from countersign.v1.sampling_pb2 import SamplingParams

REQUEST = "r1"
OPENED = Opened(model="m", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=8))


@dataclass(frozen=True, slots=True)
class Record:
    sequence: int
    data: bytes


class Outage(Exception):
    """The store is away."""


@dataclass
class Store:
    """One subject with compare-and-set. ``lose`` swallows so many acknowledgements, ``outages`` fail so many reads."""

    records: list[Record] = field(default_factory=list)
    lose: int = 0
    outages: int = 0
    appends: int = 0

    async def try_append(self, subject: str, data: bytes, *, expected: int) -> int | Literal["refused", "lost"]:
        assert subject == commit_subject(REQUEST)
        self.appends += 1
        last = self.records[-1].sequence if self.records else 0
        if expected != last:
            return "refused"
        self.records.append(Record(last + 3, data))  # sequences are the stream's: they grow, with gaps
        if self.lose:
            self.lose -= 1
            return "lost"
        return last + 3

    async def read(self, subject: str, *, after: int = 0) -> Sequence[Record]:
        if self.outages:
            self.outages -= 1
            raise Outage
        return [record for record in self.records if record.sequence > after]


def started(store: Store, instance: str = "a") -> Writer:
    async def run() -> Writer:
        opener = Opener(LogState(REQUEST))
        assert await settle(opener, opener.open(OPENED), store) == Settled()
        assert await settle(opener, opener.assign(instance), store) == Settled()
        return Writer(opener.log, epoch=1, instance=instance)

    return asyncio.run(run())


def test_a_lost_acknowledgement_is_settled_by_reading_and_stores_nothing_twice() -> None:
    store = Store()
    writer = started(store)
    store.lose = 1
    assert asyncio.run(settle(writer, writer.extend([7, 8]), store)) == Settled()
    assert replay(REQUEST, store.records).token_ids == (7, 8)
    assert len(store.records) == 3


def test_an_outage_goes_through_and_the_machine_goes_on_from_where_it_was() -> None:
    store = Store()
    writer = started(store)
    store.lose, store.outages = 1, 2
    effect = writer.extend([7])
    with pytest.raises(Outage):
        asyncio.run(settle(writer, effect, store))
    with pytest.raises(Outage):
        asyncio.run(settle(writer, ReadTail(writer.log.sequence), store))
    assert asyncio.run(settle(writer, ReadTail(writer.log.sequence), store)) == Settled()
    assert writer.log.token_ids == (7,)
    assert len(store.records) == 3


def test_a_higher_epoch_fences_and_a_cancel_stops_the_writer() -> None:
    store = Store()
    writer = started(store)
    opener = Opener(replay(REQUEST, store.records))
    asyncio.run(settle(opener, opener.assign("b"), store))
    assert asyncio.run(settle(writer, writer.extend([7]), store)) == Fenced(2, "b")
    other = Writer(replay(REQUEST, store.records), epoch=2, instance="b")
    asyncio.run(settle(opener, opener.cancel("enough"), store))
    assert asyncio.run(settle(other, other.extend([9]), store)) == CancelledByClient("enough")
    assert replay(REQUEST, store.records).token_ids == ()


def test_nothing_to_do_is_settled_without_a_call() -> None:
    store = Store()
    writer = started(store)
    before = store.appends
    assert asyncio.run(settle(writer, None, store)) == Settled()
    assert store.appends == before
