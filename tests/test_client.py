"""The client against a scripted router on a real gRPC server."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import pytest

from countersign.client import (
    Accepted,
    Client,
    Event,
    Finished,
    FinishReason,
    GenerateOptions,
    Token,
    Tokens,
    TokenSource,
    Usage,
)
from countersign.services.runtime.errors import DataLoss, InvalidArgument, NotFound, Unavailable
from countersign.services.runtime.rpc import RpcServer
from countersign.services.runtime.service import Call
from countersign.v1 import router_pb2, sampling_pb2
from countersign.v1.registry_pb2 import Instance
from countersign.v1.router_pb2 import StreamEvent

USAGE = {"prompt_tokens": 3, "output_tokens": 4, "drafted_tokens": 4, "accepted_tokens": 2, "target_passes": 2}
ACCEPTED = StreamEvent(accepted=router_pb2.Accepted(request_id="r1", model="demo", prompt_tokens=3))
FINISHED = StreamEvent(
    finished=router_pb2.Finished(
        reason=sampling_pb2.FINISH_REASON_LENGTH, usage=sampling_pb2.Usage(**USAGE), receipt=b"signed"
    )
)
SOURCES = [router_pb2.TOKEN_SOURCE_DRAFT] * 2 + [router_pb2.TOKEN_SOURCE_TARGET] * 2
TEXTS = ["de", "f ", "", "中"]


def tokens(position: int, count: int) -> StreamEvent:
    """Tokens of the one answer that this router knows; the second half is the target's own."""
    chosen = [router_pb2.Token(id=100 + i, text=TEXTS[i], source=SOURCES[i]) for i in range(position, position + count)]
    return StreamEvent(tokens=router_pb2.Tokens(position=position, tokens=chosen))


WHOLE = [ACCEPTED, tokens(0, 2), tokens(2, 2), FINISHED]
Step = StreamEvent | Exception


@dataclass
class ScriptedRouter:
    """Replays one list of events for each stream, in turn; an exception in it is raised; None in it waits for ever."""

    streams: list[list[Step | None]]
    requests: list[Any] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    descriptor = router_pb2.DESCRIPTOR.services_by_name["RouterService"]

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def close(self) -> None:
        pass

    def describe(self, instance: Instance) -> None:
        pass

    async def _play(self) -> AsyncIterator[StreamEvent]:
        try:
            for step in self.streams.pop(0):
                if step is None:
                    await asyncio.Event().wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed.set()

    async def Generate(
        self, request: router_pb2.GenerateRequest, call: Call
    ) -> AsyncIterator[router_pb2.GenerateResponse]:
        self.requests.append(request)
        async for event in self._play():
            yield router_pb2.GenerateResponse(event=event)

    async def Resume(self, request: router_pb2.ResumeRequest, call: Call) -> AsyncIterator[router_pb2.ResumeResponse]:
        self.requests.append(request)
        async for event in self._play():
            yield router_pb2.ResumeResponse(event=event)

    async def Cancel(self, request: router_pb2.CancelRequest, call: Call) -> router_pb2.CancelResponse:
        self.requests.append(request)
        return router_pb2.CancelResponse(reason=sampling_pb2.FINISH_REASON_CANCELLED)

    async def GetReceipt(self, request: router_pb2.GetReceiptRequest, call: Call) -> router_pb2.GetReceiptResponse:
        raise NotFound(f"no receipt for {request.request_id}", reason="UNKNOWN_REQUEST")

    async def OpenActivations(
        self, request: router_pb2.OpenActivationsRequest, call: Call
    ) -> router_pb2.OpenActivationsResponse:
        raise NotImplementedError

    async def OpenHidden(self, request: router_pb2.OpenHiddenRequest, call: Call) -> router_pb2.OpenHiddenResponse:
        raise NotImplementedError

    async def Tokenize(self, request: router_pb2.TokenizeRequest, call: Call) -> router_pb2.TokenizeResponse:
        raise NotImplementedError

    async def GetInfo(self, request: router_pb2.GetInfoRequest, call: Call) -> router_pb2.GetInfoResponse:
        model = router_pb2.ModelInfo(name="demo", context_length=2048, receipt_key=b"k" * 32, drafting=True)
        return router_pb2.GetInfoResponse(models=[model], version="0.1.0")


@dataclass
class Connection:
    client: Client
    router: ScriptedRouter
    address: str
    server: RpcServer


@pytest.fixture
async def serve() -> AsyncIterator[Callable[..., Any]]:
    connections: list[Connection] = []

    async def start(*streams: list[Step | None], reconnects: int = 3) -> Connection:
        router, server = ScriptedRouter(list(streams)), RpcServer("127.0.0.1:0")
        server.add(router)
        address = await server.start()
        client = Client(address, reconnects=reconnects)
        connections.append(Connection(client, router, address, server))
        return connections[-1]

    yield start
    for connection in connections:
        await connection.client.close()
        await connection.server.stop(0)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("countersign.client.FIRST_PAUSE_S", 0.001)


async def collect(connection: Connection, **options: Any) -> list[Event]:
    return [event async for event in connection.client.generate("def", **options)]


def events_of(*counts: tuple[int, int], seed: int | None = None) -> list[Event]:
    """The client's events for the one answer, its tokens cut as given."""
    sources = [TokenSource.DRAFT, TokenSource.DRAFT, TokenSource.TARGET, TokenSource.TARGET]
    parts: list[Event] = [
        Tokens(start, tuple(Token(100 + i, sources[i], TEXTS[i]) for i in range(start, start + count)))
        for start, count in counts
    ]
    return [Accepted("r1", "demo", 3, seed), *parts, Finished(FinishReason.LENGTH, Usage(**USAGE), b"signed")]


async def test_an_answer_is_accepted_then_tokens_then_finished(serve: Callable[..., Any]) -> None:
    connection = await serve(WHOLE)
    assert await collect(connection) == events_of((0, 2), (2, 2))


async def test_what_is_not_asked_for_is_left_to_the_deployment(serve: Callable[..., Any]) -> None:
    connection = await serve(WHOLE)
    await collect(connection)
    sampling = sampling_pb2.SamplingParams(max_tokens=64, top_p=1.0)
    cancel = router_pb2.ON_DISCONNECT_CANCEL
    assert connection.router.requests == [
        router_pb2.GenerateRequest(text="def", sampling=sampling, on_disconnect=cancel)
    ]


async def test_every_argument_reaches_the_server(serve: Callable[..., Any]) -> None:
    connection = await serve(WHOLE)
    options: GenerateOptions = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "seed": 2**64 - 1,
        "stop": ["\n\n", "中"],
        "stop_token_ids": [5],
        "ignore_eos": True,
        "drafting": "off",
        "model": "demo",
        "request_id": "mine",
        "timeout": 1.5,
        "on_disconnect": "continue",
        "tenant": "acme",
    }
    assert [event async for event in connection.client.generate([1, 2, 3], **options)] == events_of(
        (0, 2), (2, 2), seed=2**64 - 1
    )
    assert connection.router.requests == [
        router_pb2.GenerateRequest(
            request_id="mine",
            model="demo",
            token_ids=router_pb2.TokenIds(ids=[1, 2, 3]),
            sampling=sampling_pb2.SamplingParams(
                temperature=0.5,
                top_k=40,
                top_p=0.9,
                seed=2**64 - 1,
                max_tokens=7,
                stop_token_ids=[5],
                stop=["\n\n", "中"],
                ignore_eos=True,
            ),
            drafting=sampling_pb2.DRAFTING_OFF,
            timeout_ms=1500,
            on_disconnect=router_pb2.ON_DISCONNECT_CONTINUE,
            tenant="acme",
        )
    ]


async def test_complete_gives_the_whole_answer(serve: Callable[..., Any]) -> None:
    connection = await serve(WHOLE)
    answer = await connection.client.complete("def", temperature=1.0, seed=9)
    assert (answer.request_id, answer.text, answer.finish, answer.seed) == ("r1", "def 中", FinishReason.LENGTH, 9)
    assert [token.id for token in answer.tokens] == [100, 101, 102, 103]
    assert (answer.receipt, answer.usage.accepted_tokens) == (b"signed", 2)


async def test_a_seed_is_drawn_and_told_only_where_one_is_needed(serve: Callable[..., Any]) -> None:
    connection = await serve(WHOLE, WHOLE, WHOLE)
    drawn = [await connection.client.complete("def", temperature=0.8) for _ in range(2)]
    await connection.client.complete("def")
    sent = [request.sampling for request in connection.router.requests]
    assert [answer.seed for answer in drawn] == [params.seed for params in sent[:2]]
    assert drawn[0].seed != drawn[1].seed
    assert not sent[2].HasField("seed")


async def test_what_the_wire_carries_is_left_to_the_server_to_refuse(serve: Callable[..., Any]) -> None:
    refusal = InvalidArgument("temperature nan is not a number", reason="BAD_TEMPERATURE", help="use 0")
    connection = await serve([refusal])
    with pytest.raises(InvalidArgument) as refused:
        await collect(connection, temperature=math.nan, max_tokens=0, top_p=0.0)
    assert (refused.value.reason, refused.value.help) == ("BAD_TEMPERATURE", "use 0")
    assert math.isnan(connection.router.requests[0].sampling.temperature)


@pytest.mark.parametrize(
    ("options", "reason", "name"),
    [
        ({"prompt": "a\ud800"}, "BAD_UTF8", "prompt"),
        ({"stop": ["\udcff"]}, "BAD_UTF8", "stop"),
        ({"model": "\udcff"}, "BAD_UTF8", "model"),
        ({"prompt": [1, -1]}, "OUT_OF_RANGE", "prompt"),
        ({"prompt": [2**32]}, "OUT_OF_RANGE", "prompt"),
        ({"seed": -1}, "OUT_OF_RANGE", "seed"),
        ({"seed": 2**64}, "OUT_OF_RANGE", "seed"),
        ({"max_tokens": -1}, "OUT_OF_RANGE", "max_tokens"),
        ({"max_tokens": 2**32}, "OUT_OF_RANGE", "max_tokens"),
        ({"top_k": -1}, "OUT_OF_RANGE", "top_k"),
        ({"stop_token_ids": [-5]}, "OUT_OF_RANGE", "stop_token_ids"),
        ({"timeout": 0}, "OUT_OF_RANGE", "timeout"),
        ({"timeout": math.nan}, "OUT_OF_RANGE", "timeout"),
        ({"timeout": math.inf}, "OUT_OF_RANGE", "timeout"),
        ({"drafting": "maybe"}, "UNKNOWN_CHOICE", "drafting"),
        ({"on_disconnect": "wait"}, "UNKNOWN_CHOICE", "on_disconnect"),
    ],
)
async def test_what_the_wire_cannot_carry_is_refused_at_once_by_name(
    options: dict[str, Any], reason: str, name: str
) -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(InvalidArgument, match=name) as refused:
            client.generate(**{"prompt": "def", **options})
    assert (refused.value.reason, refused.value.metadata["argument"]) == (reason, name)


async def test_one_stop_string_needs_no_list(serve: Callable[..., Any]) -> None:
    connection = await serve(WHOLE)
    await collect(connection, stop="\n\n")
    assert list(connection.router.requests[0].sampling.stop) == ["\n\n"]


@pytest.mark.parametrize(
    "resumed",
    [
        [ACCEPTED, tokens(2, 2), FINISHED],
        [ACCEPTED, tokens(0, 4), FINISHED],  # a router may repeat what came before
        [tokens(2, 1), Unavailable("broke again")],
    ],
)
async def test_a_broken_answer_is_resumed_from_its_position(
    serve: Callable[..., Any], resumed: list[Step | None]
) -> None:
    broken = [ACCEPTED, tokens(0, 2), Unavailable("the connection broke")]
    connection = await serve(broken, resumed, [ACCEPTED, tokens(3, 1), FINISHED])
    events = await collect(connection, on_disconnect="continue", temperature=1.0, seed=4)
    assert [type(event) for event in events if not isinstance(event, Tokens)] == [Accepted, Finished]
    received = [token for event in events if isinstance(event, Tokens) for token in event.tokens]
    assert [token.id for token in received] == [100, 101, 102, 103]
    assert connection.router.requests[1] == router_pb2.ResumeRequest(request_id="r1", position=2)


async def test_a_stream_that_ends_without_its_last_event_counts_as_broken(serve: Callable[..., Any]) -> None:
    connection = await serve([ACCEPTED, tokens(0, 2)], [ACCEPTED, tokens(2, 2), FINISHED])
    assert await collect(connection, on_disconnect="continue") == events_of((0, 2), (2, 2))
    connection = await serve([ACCEPTED, tokens(0, 2)])
    with pytest.raises(Unavailable) as ended:
        await collect(connection)
    assert ended.value.reason == "STREAM_ENDED"


@pytest.mark.parametrize("grace", [0, 0.05])
async def test_a_router_that_is_replaced_in_the_middle_is_found_again(serve: Callable[..., Any], grace: float) -> None:
    connection = await serve([ACCEPTED, tokens(0, 2), None], reconnects=12)
    received: list[Event] = []
    replacement = RpcServer(connection.address)
    replacement.add(ScriptedRouter([[ACCEPTED, tokens(2, 2), FINISHED]]))
    async for event in connection.client.generate("def", on_disconnect="continue"):
        received.append(event)
        if len(received) == 2:
            await connection.server.stop(grace)
            await replacement.start()
    await replacement.stop(0)
    assert received == events_of((0, 2), (2, 2))


async def test_without_continue_a_broken_answer_is_an_error(serve: Callable[..., Any]) -> None:
    connection = await serve([ACCEPTED, tokens(0, 2), Unavailable("the connection broke")], WHOLE)
    with pytest.raises(Unavailable, match="the connection broke"):
        await collect(connection)
    assert len(connection.router.requests) == 1


async def test_an_answer_is_resumed_only_so_often(serve: Callable[..., Any]) -> None:
    down: list[Step | None] = [Unavailable("down")]
    connection = await serve([ACCEPTED, *down], down, down, WHOLE, reconnects=2)
    with pytest.raises(Unavailable, match="down"):
        await collect(connection, on_disconnect="continue")
    assert len(connection.router.requests) == 3


async def test_a_break_before_the_request_is_in_the_log_is_an_error(serve: Callable[..., Any]) -> None:
    connection = await serve([Unavailable("no target is alive", reason="NO_TARGET")], WHOLE)
    with pytest.raises(Unavailable) as raised:
        await collect(connection, on_disconnect="continue")
    assert raised.value.reason == "NO_TARGET"


async def test_missing_tokens_are_noticed(serve: Callable[..., Any]) -> None:
    connection = await serve([ACCEPTED, tokens(0, 1), tokens(2, 2), FINISHED])
    with pytest.raises(DataLoss, match="1 to 1") as raised:
        await collect(connection)
    assert raised.value.reason == "GAP"


async def test_an_event_of_an_unknown_kind_is_an_error(serve: Callable[..., Any]) -> None:
    connection = await serve([ACCEPTED, StreamEvent()])
    with pytest.raises(DataLoss) as raised:
        await collect(connection)
    assert raised.value.reason == "EMPTY_EVENT"


async def test_leaving_the_loop_closes_the_stream(serve: Callable[..., Any]) -> None:
    connection = await serve([ACCEPTED, None])
    async with aclosing(connection.client.generate("def")) as events:
        async for event in events:
            assert isinstance(event, Accepted)
            break
    await asyncio.wait_for(connection.router.closed.wait(), 10)


async def test_a_request_can_be_read_from_any_position(serve: Callable[..., Any]) -> None:
    connection = await serve([ACCEPTED, tokens(1, 1), Unavailable("broke")], [ACCEPTED, tokens(2, 2), FINISHED])
    events = [event async for event in connection.client.resume("r1", 1)]
    assert events == events_of((1, 1), (2, 2))
    assert [request.position for request in connection.router.requests] == [1, 2]


async def test_cancel_tells_why_the_request_ended(serve: Callable[..., Any]) -> None:
    connection = await serve()
    assert await connection.client.cancel("r1") is FinishReason.CANCELLED
    assert connection.router.requests == [router_pb2.CancelRequest(request_id="r1")]


async def test_errors_of_single_calls_are_typed(serve: Callable[..., Any]) -> None:
    connection = await serve()
    with pytest.raises(NotFound, match="r9") as raised:
        await connection.client.receipt("r9")
    assert raised.value.reason == "UNKNOWN_REQUEST"


async def test_info_tells_what_is_served(serve: Callable[..., Any]) -> None:
    connection = await serve()
    info = await connection.client.info()
    assert (info.version, info.models[0].name, info.models[0].receipt_key) == ("0.1.0", "demo", b"k" * 32)


async def test_nobody_at_the_address_is_an_error_not_a_wait() -> None:
    async with Client("127.0.0.1:1") as client:
        with pytest.raises(Unavailable):
            await client.complete("def")
        with pytest.raises(Unavailable):
            await client.info()
