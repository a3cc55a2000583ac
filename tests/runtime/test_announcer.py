"""Events go out in order, through outages of the bus too, and are numbered party by party."""

from __future__ import annotations

import asyncio

from countersign.services.runtime import announcer as module
from countersign.services.runtime.announcer import EVENTS, NOBODY, Announcer
from countersign.services.runtime.errors import Unavailable
from countersign.v1.event_pb2 import Delivered, Followed, ProtocolEvents, Started


class Bus:
    """Keeps what is published; is away while ``away``."""

    def __init__(self) -> None:
        self.away = False
        self.sent: list[list[tuple[str, int]]] = []

    async def publish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        assert (subject, headers) == (EVENTS, {})
        await asyncio.sleep(0)
        if self.away:
            raise Unavailable("away", reason="DISCONNECTED")
        self.sent.append([(event.party, event.number) for event in ProtocolEvents.FromString(data).events])


async def test_each_party_counts_by_itself() -> None:
    bus = Bus()
    announcer = Announcer(bus, "target-1")
    one, other = announcer.party("r1"), announcer.party("r1")
    await announcer.announce(one.says(3, started=Started(epoch=1)), other.says(3, started=Started(epoch=2)))
    await announcer.announce(one.says(4, started=Started(epoch=1)))
    assert bus.sent == [[("target-1.1", 1), ("target-1.2", 1)], [("target-1.1", 2)]]


async def test_what_an_outage_keeps_back_goes_out_first_and_in_order() -> None:
    bus = Bus()
    announcer = Announcer(bus, "target-1")
    party = announcer.party("r1")
    bus.away = True
    for _ in range(3):
        await announcer.announce(party.says(1, started=Started(epoch=1)))
    bus.away = False
    await asyncio.gather(*(announcer.announce(party.says(1, started=Started(epoch=1))) for _ in range(3)))
    assert [number for part in bus.sent for _, number in part] == [1, 2, 3, 4, 5, 6]
    assert announcer.lost == 0


async def test_what_is_said_soon_goes_out_together() -> None:
    bus = Bus()
    announcer = Announcer(bus, "router-1")
    party = announcer.party("r1")
    announcer.soon(party.says(1, followed=Followed()))
    announcer.soon(party.says(1, delivered=Delivered(token_ids=[1])))
    assert bus.sent == []
    async with asyncio.timeout(5):
        while not bus.sent:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    assert bus.sent == [[("router-1.1", 1), ("router-1.1", 2)]]


async def test_an_outage_that_lasts_loses_the_oldest_and_counts_them() -> None:
    bus = Bus()
    bus.away = True
    announcer = Announcer(bus, "target-1")
    party = announcer.party("r1")
    for _ in range(module._MOST_WAITING + 5):
        announcer.soon(party.says(1, started=Started(epoch=1)))
    assert announcer.lost == 5
    bus.away = False
    await announcer.announce()
    assert bus.sent[0][0] == ("target-1.1", 6)


async def test_nobody_says_nothing() -> None:
    NOBODY.soon(NOBODY.party("r1").says(1, started=Started(epoch=1)))
    await NOBODY.announce(NOBODY.party("r1").says(1, started=Started(epoch=1)))
    assert NOBODY.lost == 0
