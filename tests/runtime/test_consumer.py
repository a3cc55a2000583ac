"""A durable place in a stream, on a real nats-server."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.consumer import Consumer, Delivery
from countersign.services.runtime.errors import FailedPrecondition, Unavailable
from countersign.services.runtime.journal import RECEIPTS, Journal
from countersign.services.runtime.nats_server import NatsServer

END_S = 30.0


async def store(journal: Journal, *names: str) -> None:
    for name in names:
        await journal.append(f"cs.v1.receipt.{name}", name.encode(), expected=0, timeout=10)


async def fetched(consumer: Consumer, count: int) -> list[Delivery]:
    """So many, however many fetches it takes."""
    found: list[Delivery] = []
    async with asyncio.timeout(END_S):
        while len(found) < count:
            found += await consumer.fetch(100, 0.2)
    return found


async def test_all_that_was_stored_comes_in_order_the_old_and_the_new(bus: Bus, journal: Journal) -> None:
    await store(journal, "a", "b")
    consumer = await Consumer.open(bus, RECEIPTS, "reader")
    await store(journal, "c")
    found = await fetched(consumer, 3)
    assert [(one.subject, one.data, one.sequence, one.attempt) for one in found] == [
        (f"cs.v1.receipt.{name}", name.encode(), place, 1) for place, name in enumerate("abc", 1)
    ]
    await consumer.acknowledge(found)
    assert await consumer.fetch(100, 0.1) == []


async def test_what_was_not_acknowledged_comes_again_to_whoever_has_the_place_then(
    journal: Journal, connect: Callable[[], Awaitable[Bus]]
) -> None:
    await store(journal, "a", "b", "c")
    first = await Consumer.open(await connect(), RECEIPTS, "reader", ack_wait_s=0.5)
    found = await fetched(first, 3)
    await first.acknowledge(found[:1])
    second = await Consumer.open(await connect(), RECEIPTS, "reader", ack_wait_s=0.5)
    again = await fetched(second, 2)
    assert [(one.data, one.attempt) for one in again] == [(b"b", 2), (b"c", 2)]


async def test_what_is_put_off_comes_again_after_its_time(bus: Bus, journal: Journal) -> None:
    await store(journal, "a")
    consumer = await Consumer.open(bus, RECEIPTS, "reader")
    (first,) = await fetched(consumer, 1)
    await consumer.postpone(first, 0.3)
    (again,) = await fetched(consumer, 1)
    assert again.attempt == 2


async def test_a_stop_that_comes_with_a_message_is_not_lost(
    bus: Bus, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    consumer = await Consumer.open(bus, RECEIPTS, "reader")

    async def swallow(*_: object, **__: object) -> list[object]:
        """As nats-py does when both come in one turn of the loop."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(END_S)
        return []

    monkeypatch.setattr(consumer._subscription, "fetch", swallow)
    fetching = asyncio.create_task(consumer.fetch(10, END_S))
    await asyncio.sleep(0)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching


async def test_places_under_two_names_are_two_places(bus: Bus, journal: Journal) -> None:
    await store(journal, "a")
    for name in ("one", "two"):
        consumer = await Consumer.open(bus, RECEIPTS, name)
        assert [one.data for one in await fetched(consumer, 1)] == [b"a"]


async def test_a_place_outlives_the_server(bus: Bus, journal: Journal, server: NatsServer) -> None:
    await store(journal, "a", "b")
    consumer = await Consumer.open(bus, RECEIPTS, "reader")
    found = await fetched(consumer, 2)
    await consumer.acknowledge(found)
    await bus.flush()
    await server.stop()
    assert await consumer.fetch(100, 0.2) == []
    await server.start()
    async with asyncio.timeout(END_S):
        while True:
            try:
                await store(journal, "c")
                break
            except (Unavailable, FailedPrecondition):
                await asyncio.sleep(0.05)
    assert [one.data for one in await fetched(consumer, 1)] == [b"c"]


async def test_a_stream_that_is_not_there_is_said(bus: Bus, journal: Journal) -> None:
    with pytest.raises(FailedPrecondition, match="CS_NOTHING") as refusal:
        await Consumer.open(bus, "CS_NOTHING", "reader")
    assert refusal.value.reason == "CONSUMER_CONFLICT"


async def test_without_a_server_it_ends_in_a_typed_error(bus: Bus, journal: Journal, server: NatsServer) -> None:
    await server.stop()
    with pytest.raises(Unavailable):
        await Consumer.open(bus, RECEIPTS, "reader")
