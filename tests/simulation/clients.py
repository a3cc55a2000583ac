"""The real client over connections that break: each asks for one answer and does not give up before it is final."""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from google.protobuf.message import Message
from tests.simulation.monitor import Monitor
from tests.simulation.network import Network, Node

from countersign.client import Client, Finished, Tokens
from countersign.services.runtime.errors import CountersignError, Internal, NotFound, Unavailable
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.tracing import Lasted

M = TypeVar("M", bound=Message)

# What gRPC's keepalive would notice.
SILENCE_S = 8.0


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, when it is made, and when its client cancels it, if it does; seconds from the start.

    ``seeded``: every target samples the same tokens for it (compute.py).
    """

    at: float
    prompt: int
    max_tokens: int
    drafting: bool
    seeded: bool
    timeout: float = 60.0
    cancel_at: float | None = None

    def tokens(self, number: int) -> list[int]:
        """A prompt that no other request has."""
        return [2 * number + (not self.seeded), *range(1, self.prompt)]


class Connection:
    """One RPC between a client and a router: in order, until either end goes away."""

    def __init__(self, channel: SimChannel, router: Node) -> None:
        self.router, self.replies = router, asyncio.Queue[Any]()
        self._channel, self._last = channel, 0.0
        self._task: asyncio.Task[Any] | None = None
        self._context = contextvars.copy_context()
        router.connections.append(self)

    def start(self, method: str, request: Message) -> None:
        self._task = self.router.spawn(self._serve(method, request))

    async def _serve(self, method: str, request: Message) -> None:
        call = SimpleNamespace(remaining=lambda: 10.0)
        try:
            if method == "Cancel":
                self.push(await self.router.service_object.Cancel(request, call))
            else:
                async with aclosing(getattr(self.router.service_object, method)(request, call)) as replies:
                    async for reply in replies:
                        self.push(reply)
            self.push(None)
        except CountersignError as error:
            self.push(CountersignError.from_status(error.to_status()))
        except Exception:
            self.push(Internal(f"{method} failed"))
            raise

    def push(self, item: object) -> None:
        if not self._channel.network.closed:
            now = self._channel.network.loop.now
            self._last = max(self._last + 1e-6, now + self._channel.rng.uniform(0.0001, 0.002))
            self._channel.network.loop.call_at(self._last, self.replies.put_nowait, item, context=self._context)

    def break_off(self) -> None:
        """The router's end is gone."""
        self.replies.put_nowait(Unavailable("the connection broke", reason="UNREACHABLE"))

    def close(self) -> None:
        """The client's end is gone; the router notices when it next runs."""
        if self in self.router.connections:
            self.router.connections.remove(self)
        if self._task is not None:
            self._channel.network.loop.call_soon(self._task.cancel, context=self.router.context)


class SimChannel:
    """As `services/runtime/rpc_client.py`, to any router that accepts connections."""

    def __init__(self, network: Network, rng: random.Random) -> None:
        self.network, self.rng = network, rng

    async def stream(
        self,
        path: str,
        request: Message,
        reply: type[M],
        timeout: float,  # noqa: ASYNC109
        lasted: Lasted | None = None,
    ) -> AsyncGenerator[M]:
        connection = await self._connect()
        try:
            connection.start(path.rpartition("/")[2], request)
            while (item := await self._next(connection)) is not None:
                yield cast(M, item)
        finally:
            connection.close()

    async def unary(self, path: str, request: Message, reply: type[M], timeout: float) -> M:  # noqa: ASYNC109
        async with aclosing(self.stream(path, request, reply, timeout)) as replies:
            return await anext(replies)

    async def _connect(self) -> Connection:
        await asyncio.sleep(0.001)
        routers = [node for node in self.network.nodes if node.service == "router"]
        if not routers:
            raise Unavailable("no router is up", reason="UNREACHABLE")
        return Connection(self, self.rng.choice(routers))

    async def _next(self, connection: Connection) -> object:
        try:
            item = await asyncio.wait_for(connection.replies.get(), SILENCE_S)
        except TimeoutError:
            raise Unavailable("no word from the router", reason="UNREACHABLE") from None
        if isinstance(item, CountersignError):
            raise item
        return item


class SimClient:
    """Asks, reads, resumes where it was, maybe cancels; tells the monitor all that it reads."""

    def __init__(self, network: Network, rng: random.Random, monitor: Monitor, number: int, ask: Ask) -> None:
        self._network, self._monitor, self._ask = network, monitor, ask
        self.name, self._prompt = f"r{number}", ask.tokens(number)
        self._client = Client.__new__(Client)  # but for its gRPC channel
        self._client._channel = cast(Any, SimChannel(network, rng))
        self._client._address, self._client._reconnects, self._client._tracer = "router:1", 2, tracing.tracer()
        self.received: list[int] = []
        self.resumed = 0

    async def run(self) -> None:
        await asyncio.sleep(self._ask.at)
        async with asyncio.TaskGroup() as group:
            if self._ask.cancel_at is not None:
                group.create_task(self._cancel(self._ask.cancel_at))
            while not await self._read():  # noqa: ASYNC110  each try is a call of its own
                await asyncio.sleep(0.3)

    async def _read(self) -> bool:
        """One more try; whether the answer is whole now."""
        if self.received:
            self.resumed += 1
            events = self._client.resume(self.name, len(self.received))
        else:
            events = self._client.generate(
                self._prompt,
                max_tokens=self._ask.max_tokens,
                drafting="model" if self._ask.drafting else "off",
                request_id=self.name,
                timeout=self._ask.timeout,
                on_disconnect="continue",
            )
        try:
            async with aclosing(events):
                async for event in events:
                    if isinstance(event, Tokens):
                        self.received += [token.id for token in event.tokens]
                        self._network.note(f"client {self.name}: {len(self.received)} tokens")
                        self._monitor.told(self.name, self.received)
                    elif isinstance(event, Finished):
                        self._network.note(f"client {self.name}: {event.reason}")
                        self._monitor.finished(self.name, self.received, event.reason)
                        return True
        except CountersignError as error:
            self._network.note(f"client {self.name}: {type(error).__name__} {error.reason}")
            self._network.counts[f"client: {error.reason}"] += 1
            self._monitor.told_error(self.name, error)
            return error.reason == "RECEIPT_LOST"
        return False

    async def _cancel(self, at: float) -> None:
        await asyncio.sleep(max(0.0, at - self._ask.at))
        while True:
            try:
                await self._client.cancel(self.name)
            except NotFound:
                await asyncio.sleep(0.3)
            except CountersignError:
                await asyncio.sleep(0.5)
            else:
                return
