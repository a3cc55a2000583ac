"""What the bus does when nats-server dies, freezes or is not there: nothing waits for its whole timeout in silence."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager

import pytest

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import Call
from countersign.services.runtime.errors import DeadlineExceeded, InvalidArgument, Unavailable
from countersign.services.runtime.nats_server import NatsServer
from countersign.v1.kv_pb2 import LookupRequest, LookupResponse

Connect = Callable[[], Awaitable[Bus]]
Frozen = Callable[[], AbstractContextManager[None]]


async def lookup(bus: Bus, timeout: float) -> int:  # noqa: ASYNC109  what is tested
    return (await bus.call("kv", "Lookup", LookupRequest(), LookupResponse, timeout=timeout)).found


async def test_a_server_that_is_not_there_is_named(server: NatsServer) -> None:
    await server.stop()
    with pytest.raises(Unavailable) as caught:
        await Bus.connect(server.url, "test", timeout=0.3)
    assert caught.value.reason == "BUS_UNREACHABLE"
    assert server.url in str(caught.value)


async def test_an_address_that_is_none_is_an_invalid_argument() -> None:
    with pytest.raises(InvalidArgument):
        await Bus.connect("nats://host:port", "test")


async def test_a_call_under_way_when_the_server_dies_ends_at_once_and_works_again_afterwards(
    server: NatsServer, connect: Connect, bus: Bus, kv: type
) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        started.set()
        await release.wait()
        return LookupResponse(found=1)

    await (await connect()).serve("kv", "kv-1", kv(Lookup=answer).unary())
    call = asyncio.create_task(lookup(bus, timeout=60))
    async with asyncio.timeout(5):
        await started.wait()
    assert server.child is not None
    server.child.kill()
    before = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await call
    assert caught.value.reason == "CONNECTION_LOST"
    assert time.monotonic() - before < 10
    release.set()
    await server.start()
    # Sent while there is no connection, it waits for the next one; the peer may still be on its way back.
    async with asyncio.timeout(20):
        while True:
            try:
                assert await lookup(bus, timeout=10) == 1
                break
            except Unavailable as error:
                assert error.reason in {"NO_RESPONDERS", "CONNECTION_LOST"}  # noqa: PT017  the loop asks again


async def test_a_call_without_connection_ends_at_its_timeout(server: NatsServer, bus: Bus) -> None:
    assert server.child is not None
    server.child.kill()
    await server.child.wait()
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await lookup(bus, timeout=0.2)
    with pytest.raises(DeadlineExceeded):
        await lookup(bus, timeout=0.2)


async def test_what_is_kept_for_the_next_connection_is_bounded(server: NatsServer, bus: Bus) -> None:
    assert server.child is not None
    server.child.kill()
    with pytest.raises(Unavailable) as caught:
        await _fill(bus)
    assert caught.value.reason == "DISCONNECTED"


async def _fill(bus: Bus) -> None:
    async with asyncio.timeout(10):
        while True:
            await bus.publish("test.fill", b"x" * 500_000, {})
            await asyncio.sleep(0)


async def test_a_frozen_server_costs_a_call_its_timeout_and_no_more(frozen: Frozen, bus: Bus) -> None:
    with frozen():
        before = time.monotonic()
        # Together more than sockets and buffers hold, so that sending blocks as well.
        calls = (bus.request("test.big", b"x" * 1_000_000, {}, 0.3) for _ in range(10))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(result, DeadlineExceeded) for result in results)
        await bus.close()
        assert time.monotonic() - before < 10


async def test_publishing_to_a_frozen_server_does_not_block_for_ever(frozen: Frozen, bus: Bus) -> None:
    with frozen():
        for _ in range(8):  # more than sockets and buffers hold
            async with asyncio.timeout(10):
                await bus.publish("test.big", b"x" * 1_000_000, {})


async def test_a_closed_bus_says_so(bus: Bus) -> None:
    await bus.close()
    await bus.wait_closed()
    with pytest.raises(Unavailable) as caught:
        await lookup(bus, timeout=5)
    assert caught.value.reason == "BUS_CLOSED"


async def test_closing_without_server_takes_no_longer_than_a_few_seconds(server: NatsServer, bus: Bus) -> None:
    await server.stop()
    async with asyncio.timeout(5):
        await bus.close()
