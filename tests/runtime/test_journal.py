import asyncio
import os
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing, suppress
from itertools import pairwise

import pytest
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.config import NatsConfig
from countersign.services.runtime.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from countersign.services.runtime.journal import COMMITS, Entry, Journal, WrongSequence
from countersign.services.runtime.nats_server import NatsServer

Connect = Callable[[], Awaitable[Bus]]
Frozen = Callable[[], AbstractContextManager[None]]
LOG = "cs.v1.commit.r1"
OTHER = "cs.v1.commit.r2"


class LossyBus:
    """A bus whose subscriptions lose the messages for which ``lost`` says so; everything else works."""

    def __init__(self, bus: Bus, lost: Callable[[], bool]) -> None:
        self._bus = bus
        self._lost = lost
        self.lost = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._bus, name)

    async def subscribe(self, subject: str, receive: Callable[[Msg], Awaitable[None]]) -> Subscription:
        async def lossy(msg: Msg) -> None:
            if self._lost():
                self.lost += 1
            else:
                await receive(msg)

        return await self._bus.subscribe(subject, lossy)


async def write(journal: Journal, subject: str, count: int, last: int = 0) -> list[Entry]:
    entries = []
    for number in range(count):
        data = f"{subject} {number}".encode()
        last = await journal.append(subject, data, expected=last, timeout=5)
        entries.append(Entry(last, data))
    return entries


async def take(entries: AsyncIterator[Entry], count: int) -> list[Entry]:
    async with asyncio.timeout(30):
        return [await anext(entries) for _ in range(count)]


async def test_entries_are_read_in_order_without_those_of_other_logs(journal: Journal) -> None:
    first = await write(journal, LOG, 3)
    others = await write(journal, OTHER, 2)
    second = await write(journal, LOG, 2, first[-1].sequence)
    assert await journal.read(LOG) == first + second
    assert await journal.read(OTHER) == others
    assert await journal.read(LOG, after=first[1].sequence) == [first[2], *second]
    assert await journal.read(LOG, after=second[-1].sequence) == []
    assert await journal.last(LOG) == second[-1]
    assert await journal.last(OTHER) == others[-1]


async def test_a_log_without_entries_is_empty(journal: Journal) -> None:
    assert await journal.read("cs.v1.commit.none") == []
    assert await journal.last("cs.v1.commit.none") is None


async def test_long_logs_are_read_whole(journal: Journal) -> None:
    entries = await write(journal, LOG, 1001)  # one more than a batch
    assert await journal.read(LOG) == entries


async def test_large_logs_are_read_whole(journal: Journal) -> None:
    last, sizes = 0, []
    for size in (1_000_000,) * 12:  # more than the bytes of a batch
        last = await journal.append(LOG, os.urandom(size), expected=last, timeout=5)
        sizes.append(size)
    assert [len(entry.data) for entry in await journal.read(LOG)] == sizes
    assert len(await journal.read(LOG, most=sum(sizes))) == len(sizes)
    with pytest.raises(ResourceExhausted) as refusal:
        await journal.read(LOG, most=sum(sizes) - 1)
    assert refusal.value.reason == "LOG_TOO_LARGE"


async def test_an_append_that_has_not_seen_the_last_entry_is_refused_and_stores_nothing(journal: Journal) -> None:
    entries = await write(journal, LOG, 2)
    for seen in (0, entries[0].sequence, entries[1].sequence + 1):
        with pytest.raises(WrongSequence) as caught:
            await journal.append(LOG, b"late", expected=seen, timeout=5)
        assert caught.value.reason == "WRONG_LAST_SEQUENCE"
    assert await journal.read(LOG) == entries


async def test_of_many_writers_at_once_exactly_one_wins_each_round(connect: Connect, journal: Journal) -> None:
    journals = [journal, *[Journal(await connect()) for _ in range(3)]]
    last = 0
    for _ in range(10):
        results = await asyncio.gather(
            *(each.append(LOG, b"%d" % number, expected=last, timeout=5) for number, each in enumerate(journals)),
            return_exceptions=True,
        )
        (last,) = [result for result in results if isinstance(result, int)]
        assert sum(isinstance(result, WrongSequence) for result in results) == 3
    assert len(await journal.read(LOG)) == 10


async def test_after_a_lost_acknowledgement_appending_again_stores_the_entry_exactly_once(
    frozen: Frozen, journal: Journal
) -> None:
    with frozen(), pytest.raises(DeadlineExceeded) as caught:
        await journal.append(LOG, b"mine", expected=0, timeout=0.2)
    assert caught.value.reason == "ACK_LOST"
    with suppress(WrongSequence):  # the first one is stored by now
        await journal.append(LOG, b"mine", expected=0, timeout=5)
    (entry,) = await journal.read(LOG)
    assert entry.data == b"mine"
    assert await journal.last(LOG) == entry


async def test_an_append_under_way_when_the_server_dies_is_lost_and_one_that_comes_late_is_refused(
    server: NatsServer, frozen: Frozen, journal: Journal
) -> None:
    first = await journal.try_append(LOG, b"1", expected=0)
    assert isinstance(first, int)
    assert await journal.try_append(LOG, b"2", expected=0) == "refused"
    assert server.child is not None
    with frozen():
        appending = asyncio.create_task(journal.try_append(LOG, b"2", expected=first))
        await asyncio.sleep(0)
        server.child.kill()
        assert await appending == "lost"
        await server.child.wait()


async def test_a_tail_gives_what_was_there_and_what_comes(journal: Journal) -> None:
    old = await write(journal, LOG, 3)
    async with aclosing(journal.tail(LOG, after=old[0].sequence)) as tail:
        assert await take(tail, 2) == old[1:]
        new = await write(journal, LOG, 3, old[-1].sequence)
        await write(journal, OTHER, 2)
        assert await take(tail, 3) == new


async def test_a_tail_may_start_before_the_log(journal: Journal) -> None:
    async with aclosing(journal.tail(LOG)) as tail:
        waiting = asyncio.create_task(take(tail, 2))
        assert await write(journal, LOG, 2) == await waiting


@pytest.mark.parametrize("share", [0.2, 0.6, 1.0])
async def test_a_tail_that_loses_messages_gives_every_entry_once_and_in_order(
    bus: Bus, connect: Connect, journal: Journal, share: float
) -> None:
    chance = random.Random(7)
    lossy = LossyBus(await connect(), lambda: chance.random() < share)
    reader = Journal(lossy, silence=0.05)  # type: ignore[arg-type]  # stands in for a bus
    async with aclosing(reader.tail(LOG)) as tail:
        taking = asyncio.create_task(take(tail, 200))
        entries = await write(journal, LOG, 200)
        assert await taking == entries
    assert lossy.lost >= 200 * share / 2


async def test_a_reader_that_falls_behind_gets_what_its_buffer_could_not_hold(
    connect: Connect, journal: Journal
) -> None:
    reader = Journal(await connect(), silence=0.05, pending=4)
    first = await write(journal, LOG, 1)
    async with aclosing(reader.tail(LOG)) as tail:
        assert await take(tail, 1) == first
        rest = await write(journal, LOG, 50, first[-1].sequence)
        assert await take(tail, 50) == rest


async def test_entries_written_while_the_tail_reads_its_start_come_once(connect: Connect, journal: Journal) -> None:
    old = await write(journal, LOG, 100)
    writing = asyncio.create_task(write(journal, LOG, 100, old[-1].sequence))
    async with aclosing(Journal(await connect()).tail(LOG)) as tail:
        entries = await take(tail, 200)
    assert entries == old + await writing


async def test_a_tail_waits_out_a_restart_of_the_server(server: NatsServer, journal: Journal) -> None:
    first = await write(journal, LOG, 2)
    async with aclosing(journal.tail(LOG)) as tail:
        assert await take(tail, 2) == first
        waiting = asyncio.create_task(take(tail, 1))
        assert server.child is not None
        server.child.kill()
        async with asyncio.timeout(30):
            while True:
                try:
                    await server.start()
                    break
                except FailedPrecondition:  # a client of another test has got the port for a moment
                    await asyncio.sleep(0.2)
            while True:
                try:
                    second = await write(journal, LOG, 1, first[-1].sequence)
                    break
                except Unavailable:
                    continue
        assert await waiting == second


async def test_a_tail_on_a_closed_bus_ends_with_an_error(bus: Bus, journal: Journal) -> None:
    first = await write(journal, LOG, 1)
    async with aclosing(journal.tail(LOG)) as tail:
        assert await take(tail, 1) == first
        await bus.close()
        with pytest.raises(Unavailable):
            await take(tail, 1)


async def test_streams_can_be_ensured_by_many_at_once_and_again_with_another_retention(connect: Connect) -> None:
    journals = [Journal(await connect()) for _ in range(4)]
    await asyncio.gather(*(journal.ensure_streams(NatsConfig()) for journal in journals))
    entries = await write(journals[0], LOG, 1)
    await asyncio.gather(*(journal.ensure_streams(NatsConfig(commit_retention_s=3600)) for journal in journals))
    info = await (await connect()).jetstream().stream_info(COMMITS)
    assert info.config.max_age == 3600
    assert await journals[1].read(LOG) == entries


async def test_a_stream_that_cannot_become_what_is_wanted_is_named(bus: Bus) -> None:
    await bus.jetstream().add_stream(name="MINE", subjects=["cs.v1.commit.*"])
    with pytest.raises(FailedPrecondition) as caught:
        await Journal(bus).ensure_streams(NatsConfig())
    assert caught.value.reason == "STREAM_CONFLICT"


async def test_receipts_are_kept_and_not_tailed(journal: Journal) -> None:
    sequence = await journal.append("cs.v1.receipt.r1", b"signed", expected=0, timeout=5)
    assert await journal.read("cs.v1.receipt.r1") == [Entry(sequence, b"signed")]
    with pytest.raises(InvalidArgument):
        await anext(journal.tail("cs.v1.receipt.r1"))
    with pytest.raises(InvalidArgument):
        await journal.read("cs.v1.elsewhere.r1")


async def test_sequences_grow_along_a_log(journal: Journal) -> None:
    await write(journal, OTHER, 3)
    entries = await write(journal, LOG, 5)
    assert all(one.sequence < two.sequence for one, two in pairwise(entries))


async def test_a_stream_is_read_backwards_page_by_page_whole_and_without_other_subjects(journal: Journal) -> None:
    written = [
        await journal.append(f"cs.v1.receipt.r{n % 7}-{n}", b"%d" % n, expected=0, timeout=5) for n in range(400)
    ]
    found = [page async for page in journal.pages_back("cs.v1.receipt.*")]
    assert [entry.sequence for page in found for entry in page] == written[::-1]
    assert [entry.data for entry in found[0]][:2] == [b"399", b"398"]
    assert len(found[0]) < len(found[1]), "the first page is short: most want no more"
    assert [page async for page in journal.pages_back("cs.v1.draw.*")] == []


async def test_entries_that_come_while_a_stream_is_read_backwards_are_not_told_twice(journal: Journal) -> None:
    for number in range(100):
        await journal.append(f"cs.v1.receipt.old-{number}", b"old", expected=0, timeout=5)
    seen: list[int] = []
    async for page in journal.pages_back("cs.v1.receipt.*"):
        seen += [entry.sequence for entry in page]
        await journal.append(f"cs.v1.receipt.new-{len(seen)}", b"new", expected=0, timeout=5)
    assert seen == sorted(set(seen), reverse=True)
    assert len(seen) == 100


async def test_the_newest_entries_of_many_subjects_come_at_once(journal: Journal) -> None:
    for auditor in ("a", "b"):
        for receipt in ("1", "2", "3"):
            await journal.append(
                f"cs.v1.verdict.{auditor}.{receipt}", f"{auditor}{receipt}".encode(), expected=0, timeout=5
            )
    found = await journal.newest_each(["cs.v1.verdict.*.1", "cs.v1.verdict.a.3", "cs.v1.verdict.*.9"])
    assert {subject: entry.data for subject, entry in found.items()} == {
        "cs.v1.verdict.a.1": b"a1",
        "cs.v1.verdict.b.1": b"b1",
        "cs.v1.verdict.a.3": b"a3",
    }
    assert await journal.newest_each(["cs.v1.verdict.*.9"]) == {}
    assert await journal.newest_each([]) == {}
    assert found["cs.v1.verdict.a.1"].sequence < found["cs.v1.verdict.b.1"].sequence
