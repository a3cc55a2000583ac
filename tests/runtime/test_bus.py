import asyncio
import time
from collections.abc import Awaitable, Callable

import pytest
from google.rpc.status_pb2 import Status
from nats.aio.msg import Msg

from countersign.services.runtime.bus import Bus, subject_of
from countersign.services.runtime.call import Call
from countersign.services.runtime.errors import (
    CountersignError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from countersign.services.runtime.inbox import wire_size
from countersign.v1.kv_pb2 import GetStatsRequest, GetStatsResponse, LookupRequest, LookupResponse

Connect = Callable[[], Awaitable[Bus]]


async def lookup(
    bus: Bus,
    request: LookupRequest | None = None,
    *,
    timeout: float = 5,  # noqa: ASYNC109  what is tested
    instance: str = "",
) -> int:
    reply = await bus.call(
        "kv", "Lookup", request or LookupRequest(), LookupResponse, timeout=timeout, instance=instance or None
    )
    return reply.found


async def test_a_call_returns_what_the_handler_answers(connect: Connect, bus: Bus, kv: type) -> None:
    calls: list[Call] = []

    async def found(request: LookupRequest, call: Call) -> LookupResponse:
        calls.append(call)
        return LookupResponse(found=len(request.keys), address="a:1")

    await (await connect()).serve("kv", "kv-1", kv(Lookup=found).unary())
    before = time.time()
    assert await lookup(bus, LookupRequest(keys=[b"1", b"2"]), timeout=7) == 2
    assert calls[0].transport == "nats"
    assert before + 6.9 < calls[0].deadline_unix_ms / 1000 < time.time() + 7.1
    assert 0 < calls[0].remaining() <= 7


async def test_a_call_goes_to_one_instance_any_or_the_one_named(connect: Connect, bus: Bus, kv: type) -> None:
    answered: list[int] = []

    def numbered(number: int) -> Callable[..., Awaitable[LookupResponse]]:
        async def answer(request: LookupRequest, call: Call) -> LookupResponse:
            answered.append(number)
            return LookupResponse(found=number)

        return answer

    peers = [await connect(), await connect()]
    for number, peer in enumerate(peers):
        await peer.serve("kv", f"kv-{number}", kv(Lookup=numbered(number)).unary())
    assert {await lookup(bus) for _ in range(40)} == {0, 1}
    assert {await lookup(bus, instance="kv-1") for _ in range(10)} == {1}
    for peer in peers:
        await peer.stop_serving(5)
    assert len(answered) == 50


async def test_a_slow_call_does_not_hold_up_the_next(connect: Connect, bus: Bus, kv: type) -> None:
    release = asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        if request.holder == "slow":
            await release.wait()
        return LookupResponse(found=1)

    await (await connect()).serve("kv", "kv-1", kv(Lookup=answer).unary())
    slow = asyncio.create_task(lookup(bus, LookupRequest(holder="slow")))
    assert await lookup(bus) == 1
    assert not slow.done()
    release.set()
    assert await slow == 1


async def test_an_error_of_the_handler_reaches_the_caller_as_it_is(connect: Connect, bus: Bus, kv: type) -> None:
    async def refuse(request: LookupRequest, call: Call) -> LookupResponse:
        raise NotFound("no such key", reason="NO_KEY", help="put it first", key="k")

    await (await connect()).serve("kv", "kv-1", kv(Lookup=refuse).unary())
    with pytest.raises(NotFound) as caught:
        await lookup(bus)
    assert (caught.value.reason, caught.value.help, caught.value.metadata) == ("NO_KEY", "put it first", {"key": "k"})


@pytest.mark.parametrize("fault", [ValueError("secret"), TimeoutError("secret"), "not a message"])
async def test_a_bug_in_a_handler_is_logged_and_answered_without_its_text(
    connect: Connect, bus: Bus, kv: type, caplog: pytest.LogCaptureFixture, fault: object
) -> None:
    async def fail(request: LookupRequest, call: Call) -> object:
        if isinstance(fault, Exception):
            raise fault
        return fault

    await (await connect()).serve("kv", "kv-1", kv(Lookup=fail).unary())
    with pytest.raises(Internal) as caught:
        await lookup(bus)
    assert "secret" not in str(caught.value)
    if isinstance(fault, Exception):
        assert any(record.exc_info and record.exc_info[1] is fault for record in caplog.records)


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x01\xff"], ids=["no message", "a string that is not UTF-8"])
async def test_bytes_that_are_no_request_are_an_invalid_argument(
    connect: Connect, bus: Bus, kv: type, data: bytes
) -> None:
    await (await connect()).serve("kv", "kv-1", kv().unary())
    reply = await bus.request("cs.v1.kv.Lookup", data, {}, 5)
    assert reply.headers == {"Cs-Status": "error"}
    error = CountersignError.from_status(Status.FromString(reply.data))
    assert isinstance(error, InvalidArgument)
    assert error.reason == "MALFORMED_REQUEST"


async def test_nobody_listening_is_known_at_once(bus: Bus) -> None:
    start = time.monotonic()
    with pytest.raises(Unavailable) as caught:
        await lookup(bus, timeout=30)
    assert caught.value.reason == "NO_RESPONDERS"
    assert time.monotonic() - start < 5


async def test_a_handler_is_cancelled_at_the_deadline_and_the_caller_told(connect: Connect, bus: Bus, kv: type) -> None:
    cancelled = asyncio.Event()

    async def hang(request: LookupRequest, call: Call) -> LookupResponse:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return LookupResponse()

    await (await connect()).serve("kv", "kv-1", kv(Lookup=hang).unary())
    with pytest.raises(DeadlineExceeded):
        await lookup(bus, timeout=0.2)
    async with asyncio.timeout(5):
        await cancelled.wait()


async def test_a_call_past_its_deadline_is_answered_without_running(connect: Connect, bus: Bus, kv: type) -> None:
    ran = asyncio.Event()

    async def run(request: LookupRequest, call: Call) -> LookupResponse:
        ran.set()
        return LookupResponse()

    await (await connect()).serve("kv", "kv-1", kv(Lookup=run).unary())
    reply = await bus.request("cs.v1.kv.Lookup", b"", {"Cs-Deadline": "1000"}, 5)
    assert reply.headers == {"Cs-Status": "error"}
    assert b"EXPIRED_ON_ARRIVAL" in reply.data
    assert not ran.is_set()
    with pytest.raises(DeadlineExceeded):
        await lookup(bus, timeout=0)


async def test_calls_over_the_bound_are_refused_at_once_and_the_others_answered(
    connect: Connect, bus: Bus, kv: type
) -> None:
    release = asyncio.Event()
    running = most = 0

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await release.wait()
        running -= 1
        return LookupResponse(found=1)

    await (await connect()).serve("kv", "kv-1", kv(Lookup=answer).unary(), concurrency=2, queue=3)
    calls = [asyncio.create_task(lookup(bus)) for _ in range(8)]
    done, _ = await asyncio.wait(calls, return_when=asyncio.FIRST_EXCEPTION)
    while len(done) < 3:
        done, _ = await asyncio.wait(calls, timeout=0.01)
    release.set()
    results = await asyncio.gather(*calls, return_exceptions=True)
    refused = [result for result in results if isinstance(result, ResourceExhausted)]
    assert [error.reason for error in refused] == ["OVERLOADED"] * 3
    assert results.count(1) == 5
    assert most == 2


async def test_a_payload_over_the_limit_is_an_error_on_either_side_and_the_bus_stays_up(
    connect: Connect, bus: Bus, kv: type
) -> None:
    async def huge(request: LookupRequest, call: Call) -> LookupResponse:
        return LookupResponse(address="x" * (1 << 20))

    await (await connect()).serve("kv", "kv-1", kv(Lookup=huge).unary())
    for request in (LookupRequest(holder="x" * (1 << 20)), LookupRequest()):
        with pytest.raises(ResourceExhausted) as caught:
            await lookup(bus, request)
        assert caught.value.reason == "PAYLOAD_TOO_LARGE"
    with pytest.raises(ResourceExhausted):
        await lookup(bus)


async def test_headers_count_against_the_limit_as_the_server_counts_them(bus: Bus) -> None:
    got: asyncio.Queue[Msg] = asyncio.Queue()
    await bus.subscribe("test.size", got.put)
    headers = {"Cs-Test": "é" * 10}
    fits = b"x" * ((1 << 20) - wire_size(b"", headers))
    await bus.publish("test.size", fits, headers)
    async with asyncio.timeout(5):
        assert len((await got.get()).data) == len(fits)
    with pytest.raises(ResourceExhausted):
        await bus.publish("test.size", fits + b"x", headers)


async def test_a_reply_that_is_no_message_is_an_internal_error(bus: Bus, connect: Connect) -> None:
    peer = await connect()

    async def answer(msg: Msg) -> None:
        await peer.publish(msg.reply, b"\xff\xff\xff", {})

    await peer.subscribe("cs.v1.kv.Lookup", answer)
    await peer.flush()
    with pytest.raises(Internal) as caught:
        await lookup(bus)
    assert caught.value.reason == "MALFORMED_REPLY"


async def test_messages_that_a_slow_reader_loses_are_counted(bus: Bus, connect: Connect) -> None:
    blocked = asyncio.Event()

    async def receive(msg: Msg) -> None:
        await blocked.wait()

    await bus.subscribe("test.flood", receive, pending=2)
    await bus.flush()
    sender = await connect()
    for _ in range(10):
        await sender.publish("test.flood", b"", {})
    await sender.flush()
    await bus.flush()
    assert bus.dropped >= 7
    blocked.set()


async def test_stopping_answers_the_calls_in_hand(connect: Connect, bus: Bus, kv: type) -> None:
    started: asyncio.Queue[None] = asyncio.Queue()
    release = asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        started.put_nowait(None)
        await (asyncio.Event() if request.holder == "hang" else release).wait()
        return LookupResponse(found=1)

    peer = await connect()
    await peer.serve("kv", "kv-1", kv(Lookup=answer).unary())
    ends, hangs = (asyncio.create_task(lookup(bus, LookupRequest(holder=name))) for name in ("ends", "hang"))
    async with asyncio.timeout(5):
        await started.get()
        await started.get()
    stopping = asyncio.create_task(peer.stop_serving(0.3))
    release.set()
    assert await ends == 1
    with pytest.raises(Unavailable) as caught:
        await hangs
    assert caught.value.reason == "STOPPING"
    await stopping
    with pytest.raises(Unavailable) as caught:
        await lookup(bus)
    assert caught.value.reason == "NO_RESPONDERS"


async def test_once_flushed_a_subscription_is_known_to_the_server(connect: Connect, bus: Bus) -> None:
    peer = await connect()

    async def answer(msg: Msg) -> None:
        await peer.publish(msg.reply, b"", {})

    for number in range(100):
        await peer.subscribe(f"test.{number}", answer)
        await peer.flush()
        await bus.request(f"test.{number}", b"", {}, 5)


async def test_no_call_is_lost_while_an_instance_stops(connect: Connect, bus: Bus, kv: type) -> None:
    reached = asyncio.Event()

    async def stay(request: LookupRequest, call: Call) -> LookupResponse:
        return LookupResponse(found=1)

    async def leave(request: LookupRequest, call: Call) -> LookupResponse:
        reached.set()
        return LookupResponse(found=1)

    stays, leaves = await connect(), await connect()
    await stays.serve("kv", "kv-0", kv(Lookup=stay).unary(), queue=1000)
    for number in range(5):
        await leaves.serve("kv", f"kv-{number}", kv(Lookup=leave).unary(), queue=1000)
        reached.clear()
        # More than one read of the socket, so that some are on their way when the first is answered.
        request = LookupRequest(holder="x" * 2000)
        calls = [asyncio.create_task(lookup(bus, request)) for _ in range(300)]
        async with asyncio.timeout(5):
            await reached.wait()
        await leaves.stop_serving(5)
        assert await asyncio.gather(*calls) == [1] * 300


@pytest.mark.parametrize("name", ["", "a.b", "*", ">", "a b", "x" * 65, "a\r\nPUB x 0"])
def test_a_name_that_would_change_the_subject_is_refused(name: str) -> None:
    with pytest.raises(InvalidArgument):
        subject_of("kv", "Lookup", name)


async def test_an_empty_message_is_a_message(connect: Connect, bus: Bus, kv: type) -> None:
    async def stats(request: GetStatsRequest, call: Call) -> GetStatsResponse:
        return GetStatsResponse()

    await (await connect()).serve("kv", "kv-1", kv(GetStats=stats).unary())
    assert await bus.call("kv", "GetStats", GetStatsRequest(), GetStatsResponse, timeout=5) == GetStatsResponse()
