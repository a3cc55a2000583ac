import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from countersign.services.runtime.call import Call
from countersign.services.runtime.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    Unimplemented,
)
from countersign.services.runtime.rpc import Channel, RpcServer
from countersign.v1.kv_pb2 import (
    GetPart,
    GetRequest,
    GetResponse,
    LookupRequest,
    LookupResponse,
    PutPart,
    PutRequest,
    PutResponse,
)

LOOKUP = "/countersign.v1.KvService/Lookup"
PUT = "/countersign.v1.KvService/Put"
GET = "/countersign.v1.KvService/Get"
Serve = Callable[..., Any]


@pytest.fixture
def serve(kv: type) -> Serve:
    """``async with serve(Lookup=...) as channel``: a server with these handlers and a channel to it."""

    @asynccontextmanager
    async def serve(*, max_concurrent: int = 64, **handlers: Callable[..., Any]) -> AsyncIterator[Channel]:
        server = RpcServer("127.0.0.1:0", max_concurrent=max_concurrent)
        server.add(kv(**handlers))
        async with Channel(await server.start()) as channel:
            try:
                yield channel
            finally:
                await server.stop(0)

    return serve


async def lookup(channel: Channel, *, timeout: float = 5, holder: str = "") -> int:  # noqa: ASYNC109  what is tested
    return (await channel.unary(LOOKUP, LookupRequest(holder=holder), LookupResponse, timeout)).found


async def answer_one(request: LookupRequest, call: Call) -> LookupResponse:
    return LookupResponse(found=1)


async def test_a_unary_call_returns_what_the_handler_answers_and_carries_its_deadline(serve: Serve) -> None:
    calls: list[Call] = []

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        calls.append(call)
        return LookupResponse(found=len(request.holder))

    async with serve(Lookup=answer) as channel:
        assert await lookup(channel, holder="four", timeout=7) == 4
    assert calls[0].transport == "grpc"
    assert 6 < calls[0].deadline_unix_ms / 1000 - time.time() <= 7.1


async def test_a_server_stream_arrives_in_order(serve: Serve) -> None:
    async def get(request: GetRequest, call: Call) -> AsyncIterator[GetResponse]:
        for key in request.keys:
            yield GetResponse(parts=[GetPart(data=key + b"x" * 2_000_000)])

    async with serve(Get=get) as channel:
        replies = [reply async for reply in channel.stream(GET, GetRequest(keys=[b"1", b"2", b"3"]), GetResponse, 5)]
    assert [reply.parts[0].data[:1] for reply in replies] == [b"1", b"2", b"3"]
    assert len(replies[0].parts[0].data) == 2_000_001


async def requests(*keys: bytes) -> AsyncIterator[PutRequest]:
    for key in keys:
        yield PutRequest(parts=[PutPart(key=key, data=b"x" * 2_000_000)])


async def test_a_client_stream_is_read_in_order(serve: Serve) -> None:
    keys = []

    async def put(stream: AsyncIterator[PutRequest], call: Call) -> PutResponse:
        async for request in stream:
            keys.append(request.parts[0].key)  # noqa: PERF401  as it comes
        return PutResponse(sealed=len(keys))

    async with serve(Put=put) as channel:
        assert (await channel.put_stream(PUT, requests(b"1", b"2"), PutResponse, 5)).sealed == 2
    assert keys == [b"1", b"2"]


async def test_a_handler_that_ends_a_client_stream_early_is_heard_all_the_same(serve: Serve) -> None:
    async def put(stream: AsyncIterator[PutRequest], call: Call) -> PutResponse:
        if (await anext(stream)).parts[0].key == b"refuse":
            raise ResourceExhausted("no room", reason="FULL")
        return PutResponse(sealed=1)

    async with serve(Put=put) as channel:
        assert (await channel.put_stream(PUT, requests(b"take", b"2", b"3"), PutResponse, 10)).sealed == 1
        with pytest.raises(ResourceExhausted) as caught:
            await channel.put_stream(PUT, requests(b"refuse", b"2", b"3"), PutResponse, 10)
    assert caught.value.reason == "FULL"


async def test_a_client_that_never_ends_its_stream_is_cut_off(serve: Serve) -> None:
    async def put(stream: AsyncIterator[PutRequest], call: Call) -> PutResponse:
        raise ResourceExhausted("no room", reason="FULL")

    async def endless() -> AsyncIterator[PutRequest]:
        while True:
            yield PutRequest(parts=[PutPart(data=b"x" * 100_000)])

    async with serve(Put=put) as channel:
        with pytest.raises((ResourceExhausted, Unavailable)) as caught:
            await channel.put_stream(PUT, endless(), PutResponse, 60)
    assert caught.value.reason in {"FULL", "STREAM_BROKEN"}


async def test_what_the_senders_iterator_raises_reaches_the_sender_and_cancels_the_handler(serve: Serve) -> None:
    cancelled = asyncio.Event()

    async def put(stream: AsyncIterator[PutRequest], call: Call) -> PutResponse:
        try:
            async for _ in stream:
                pass
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return PutResponse()

    async def broken() -> AsyncIterator[PutRequest]:
        yield PutRequest()
        raise ValueError("mine")

    async with serve(Put=put) as channel:
        with pytest.raises(ValueError, match="mine"):
            await channel.put_stream(PUT, broken(), PutResponse, 10)
        async with asyncio.timeout(5):
            await cancelled.wait()


@pytest.mark.parametrize("shape", ["unary", "stream", "put"])
async def test_a_typed_error_arrives_whole_from_every_shape_of_call(serve: Serve, shape: str) -> None:
    def failure() -> NotFound:
        return NotFound("no such key ü\n", reason="NO_KEY", help="put it first", key="k")

    async def unary(request: object, call: Call) -> LookupResponse:
        raise failure()

    async def stream(request: object, call: Call) -> AsyncIterator[GetResponse]:
        yield GetResponse(parts=[GetPart(data=b"1")])
        raise failure()

    async with serve(Lookup=unary, Get=stream, Put=unary) as channel:
        with pytest.raises(NotFound) as caught:
            await _call(channel, shape)
    error = caught.value
    assert (error.message, error.reason, error.metadata) == ("no such key ü\n", "NO_KEY", {"key": "k"})


async def _call(channel: Channel, shape: str) -> None:
    if shape == "unary":
        await lookup(channel)
    elif shape == "stream":
        async for reply in channel.stream(GET, GetRequest(), GetResponse, 5):
            assert reply.parts[0].data == b"1"
    else:
        await channel.put_stream(PUT, requests(b"1"), PutResponse, 5)


async def test_the_longest_error_still_arrives_with_its_details(serve: Serve) -> None:
    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        raise InvalidArgument("ü" * 10_000, reason="LONG", help="ü" * 10_000, text="ü" * 10_000)

    async with serve(Lookup=answer) as channel:
        with pytest.raises(InvalidArgument) as caught:
            await lookup(channel)
    assert caught.value.reason == "LONG"


async def test_a_bug_in_a_handler_is_logged_and_answered_without_its_text(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        raise ValueError("secret")

    async with serve(Lookup=answer) as channel:
        with pytest.raises(Internal) as caught:
            await lookup(channel)
    assert "secret" not in str(caught.value)
    assert "ValueError: secret" in caplog.text


@pytest.mark.parametrize("data", [b"\xff", b"\x12\x01\xff"], ids=["no message", "a string that is not UTF-8"])
async def test_bytes_that_are_no_request_are_an_invalid_argument_and_the_server_goes_on(
    serve: Serve, data: bytes
) -> None:
    async with serve(Lookup=answer_one) as channel:
        with pytest.raises(InvalidArgument) as caught:
            await channel.unary(LOOKUP, _Bytes(data), LookupResponse, 5)
        assert caught.value.reason == "MALFORMED_REQUEST"
        assert await lookup(channel) == 1


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def SerializeToString(self) -> bytes:
        return self._data


async def test_a_cancelled_caller_cancels_the_handler(serve: Serve) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return LookupResponse()

    async with serve(Lookup=answer) as channel, asyncio.timeout(10):
        call = asyncio.create_task(lookup(channel, timeout=60))
        await started.wait()
        call.cancel()
        await cancelled.wait()


async def test_a_closed_stream_runs_the_handlers_cleanup(serve: Serve) -> None:
    cleaned = asyncio.Event()

    async def get(request: GetRequest, call: Call) -> AsyncIterator[GetResponse]:
        try:
            while True:
                yield GetResponse(parts=[GetPart(data=b"1")])
                await asyncio.sleep(0.01)
        finally:
            cleaned.set()

    async with serve(Get=get) as channel, asyncio.timeout(10):
        async with aclosing(channel.stream(GET, GetRequest(), GetResponse, 60)) as replies:
            assert (await anext(replies)).parts[0].data == b"1"
        await cleaned.wait()


async def test_a_handler_past_the_deadline_is_cancelled_and_the_caller_told(serve: Serve) -> None:
    cancelled = asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return LookupResponse()

    async with serve(Lookup=answer) as channel:
        with pytest.raises(DeadlineExceeded):
            await lookup(channel, timeout=0.2)
        async with asyncio.timeout(5):
            await cancelled.wait()
        with pytest.raises(DeadlineExceeded):
            await lookup(channel, timeout=0)


async def test_calls_over_the_bound_are_refused_while_health_goes_on(serve: Serve) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        started.set()
        await release.wait()
        return LookupResponse(found=1)

    async with serve(Lookup=answer, max_concurrent=1) as channel:
        first = asyncio.create_task(lookup(channel))
        async with asyncio.timeout(5):
            await started.wait()
        with pytest.raises(ResourceExhausted) as caught:
            await lookup(channel)
        assert caught.value.reason == "OVERLOADED"
        check = health_pb2.HealthCheckRequest()
        await channel.unary("/grpc.health.v1.Health/Check", check, health_pb2.HealthCheckResponse, 5)
        release.set()
        assert await first == 1


async def test_a_server_that_is_not_there_is_named() -> None:
    async with Channel("127.0.0.1:1") as channel:
        with pytest.raises(Unavailable) as caught:
            await lookup(channel)
    assert caught.value.reason == "UNREACHABLE"
    assert "127.0.0.1:1" in str(caught.value)


async def test_a_method_that_is_not_there_is_unimplemented(serve: Serve) -> None:
    async with serve() as channel:
        with pytest.raises(Unimplemented):
            await channel.unary("/countersign.v1.KvService/Nothing", LookupRequest(), LookupResponse, 5)


async def test_a_message_over_the_limit_is_a_typed_error(serve: Serve) -> None:
    async with serve(Lookup=answer_one) as channel:
        with pytest.raises(ResourceExhausted):
            await lookup(channel, holder="x" * (65 << 20))
        assert await lookup(channel, holder="x" * (8 << 20)) == 1


async def test_health_is_told_for_each_service_and_the_whole(kv: type) -> None:
    server = RpcServer("127.0.0.1:0")
    server.add(kv())
    address = await server.start(serving=False)
    states = health_pb2.HealthCheckResponse
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            for serving in (False, True):
                await server.set_serving(serving)
                for name in ("", "countersign.v1.KvService"):
                    reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
                    assert reply.status == (states.SERVING if serving else states.NOT_SERVING)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Check(health_pb2.HealthCheckRequest(service="countersign.v1.Nothing"))
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    finally:
        await server.stop(0)


async def test_reflection_lists_the_services_and_describes_them(kv: type) -> None:
    server = RpcServer("127.0.0.1:0")
    server.add(kv())
    address = await server.start()

    def ask() -> tuple[set[str], str]:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            return set(database.get_services()), database.FindFileContainingSymbol("countersign.v1.KvService").name

    try:
        services, file = await asyncio.to_thread(ask)
    finally:
        await server.stop(0)
    assert {"countersign.v1.KvService", "grpc.health.v1.Health"} <= services
    assert file == "countersign/v1/kv.proto"


async def test_a_port_that_is_taken_is_a_typed_error() -> None:
    first = RpcServer("127.0.0.1:0")
    address = await first.start()
    second = RpcServer(address)
    with pytest.raises(FailedPrecondition) as caught:
        await second.start()
    assert caught.value.reason == "ADDRESS_UNUSABLE"
    assert address in str(caught.value)
    await second.stop(0)
    await first.stop(0)


async def test_stopping_lets_the_calls_in_hand_end(kv: type) -> None:
    started, release = asyncio.Event(), asyncio.Event()

    async def answer(request: LookupRequest, call: Call) -> LookupResponse:
        started.set()
        await release.wait()
        return LookupResponse(found=1)

    server = RpcServer("127.0.0.1:0")
    server.add(kv(Lookup=answer))
    async with Channel(await server.start()) as channel:
        call = asyncio.create_task(lookup(channel))
        async with asyncio.timeout(5):
            await started.wait()
        stopping = asyncio.create_task(server.stop(5))
        release.set()
        assert await call == 1
        await stopping


def test_a_service_without_one_of_its_methods_is_refused_when_added() -> None:
    class Empty:
        descriptor = LookupRequest.DESCRIPTOR.file.services_by_name["KvService"]

    async def add() -> None:
        RpcServer("127.0.0.1:0").add(Empty())

    with pytest.raises(TypeError, match=r"Empty does not define countersign\.v1\.KvService\.Lookup"):
        asyncio.run(add())
