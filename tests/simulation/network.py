"""Processes, their links to the NATS server, and the bus and the registry as each process sees them."""

from __future__ import annotations

import asyncio
import contextvars
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, TypeVar, cast

from google.protobuf.message import Message
from nats.aio.msg import Msg
from tests.simulation import jetstream
from tests.simulation.jetstream import COMMIT, RECEIPT, JetStream
from tests.simulation.virtual_time import PROCESS, SimLoop

from countersign.services.runtime.errors import CountersignError, DeadlineExceeded, Internal, Unavailable
from countersign.v1.registry_pb2 import Instance
from countersign.v1.tokenizer_pb2 import DecodeRequest, DecodeResponse

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Reply = Callable[[Any], None]

TTL_S = 3.0
BEAT_S = 1.0
NOWHERE = contextvars.Context()


@dataclass(frozen=True, slots=True)
class Noise:
    """How likely each is: a message is lost, comes twice, takes seconds; a read is old, cut short or torn; an append is
    stored and its ack is lost; JetStream has no leader.
    """

    drop: float = 0
    duplicate: float = 0
    slow: float = 0
    stale: float = 0
    short: float = 0
    torn: float = 0
    ack_lost: float = 0
    away: float = 0


class Node:
    """A process: its callbacks can be frozen or dropped, its link can be cut either way."""

    def __init__(self, network: Network, service: str, instance: str, skew_ms: int) -> None:
        self.service, self.instance, self.skew_ms = service, instance, skew_ms
        self.dead = self.paused = False
        self.frozen: list[asyncio.Handle] = []
        self.cut: set[str] = set()
        self.context = contextvars.copy_context()
        self.context.run(PROCESS.set, self)
        self.loop = network.loop
        self.bus = SimBus(network, self)
        self.registry = SimRegistry(network.loop)
        self.handlers: dict[str, Callable[[Any, Any], Awaitable[Message]]] = {}
        self.requests: dict[str, type[Message]] = {}
        self.connections: list[Any] = []
        self.leaving = False
        self.service_object: Any = None
        self.running: Any = None
        self.left: Callable[[], int] = int
        network.all_nodes.append(self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self.loop.create_task(work, context=self.context)


class SimRegistry:
    """The live processes, as far as their heartbeats came through."""

    def __init__(self, loop: SimLoop) -> None:
        self._loop = loop
        self._records: dict[str, tuple[Instance, float]] = {}
        self._changed = asyncio.Event()

    def heard(self, instance: Instance, ttl: float) -> None:
        self._records[instance.instance] = (instance, self._loop.now + ttl)
        self._changed.set()

    async def until(self, look: Callable[[], T | None], timeout: float) -> T | None:  # noqa: ASYNC109
        """As `Registry.until`."""
        try:
            async with asyncio.timeout(timeout):
                while (found := look()) is None:
                    self._changed.clear()
                    await self._changed.wait()
                return found
        except TimeoutError:
            return None

    def live(self, service: str) -> list[Instance]:
        """As `Registry.live`."""
        records = sorted(self._records.items())
        return [each for _, (each, expires) in records if expires > self._loop.now and each.service == service]


class Network:
    """One server, a link to each node, and one random stream for all that happens on the way."""

    def __init__(
        self,
        loop: SimLoop,
        rng: random.Random,
        noise: Noise,
        note: Callable[[str], None],
        stored: Callable[..., None],
        heard: Callable[[bytes], None],
    ) -> None:
        self.loop, self.rng, self.noise, self.note, self.heard = loop, rng, noise, note, heard
        self.counts: Counter[str] = Counter()
        self.nodes: list[Node] = []
        self.all_nodes: list[Node] = []
        self.outside = NOWHERE
        self.closed = False
        self.stream = JetStream(stored, self._republish)
        self.subscriptions: dict[str, list[Subscription]] = {}

    def chance(self, probability: float) -> bool:
        return probability > 0 and self.rng.random() < probability

    def send(self, node: Node, way: str, deliver: Callable[..., Any], *args: Any) -> None:
        """One message ``up`` to the server or ``down`` from it; nothing, once, or twice, some time later."""
        if self.closed or node.dead:
            return
        if way in node.cut or not node.bus.connected or self.chance(self.noise.drop):
            self.counts["lost"] += 1
            return
        copies = 1 + self.chance(self.noise.duplicate)
        self.counts["duplicate"] += copies - 1
        for _ in range(copies):
            delay = self.rng.uniform(0.0001, 0.004)
            if self.chance(self.noise.slow):
                self.counts["slow"] += 1
                delay += self.rng.uniform(0, 4)
            self.loop.call_later(delay, deliver, *args, context=node.context if way == "down" else NOWHERE)

    def handle(self, node: Node, subject: str, data: bytes, headers: Mapping[str, str], answer: Reply) -> None:
        """A request to JetStream, as the server gets it."""
        if self.chance(self.noise.away):
            if "DIRECT.GET" in subject:
                answer(Unavailable(f"nobody listens on {subject}", reason="NO_RESPONDERS"))
                return
            answer([jetstream.reply({"error": {"code": 503, "err_code": 10008, "description": "no leader"}})])
        elif subject.startswith((COMMIT, RECEIPT)):
            result = self.stream.publish(subject, data, headers, self.loop.now, node.instance)
            if "error" in result:
                self.counts["refused"] += 1
                self.note(f"{node.instance}: append to {subject} is refused, {result['error']['description']}")
            elif self.chance(self.noise.ack_lost):
                self.counts["ack lost"] += 1
                return
            answer([jetstream.reply(result)])
        else:
            answer(self._read(subject, json.loads(data)))

    def _read(self, api: str, query: Mapping[str, Any]) -> list[Msg]:
        if "STREAM.INFO" in api:
            return [jetstream.reply(self.stream.get_info(COMMIT))]
        if "STREAM.MSG.GET" in api:
            return [jetstream.reply(self.stream.get_last(query["last_by_subj"]))]
        lag = self.rng.uniform(0, 0.5) if self.chance(self.noise.stale) else 0.0
        most = 2 if self.chance(self.noise.short) else query["batch"]
        messages = self.stream.get_batch(query["next_by_subj"], query["seq"], self.loop.now - lag, most)
        if len(messages) > 1 and self.chance(self.noise.torn):
            self.counts["torn"] += 1
            del messages[self.rng.randrange(len(messages) - 1)]  # any but the end
        return messages

    def _republish(self, subject: str, data: bytes, headers: dict[str, str]) -> None:
        for subscription in self.subscriptions.get(subject, []):
            message = Msg(_client=None, subject=subject, data=data, headers=headers)  # type: ignore[arg-type]
            self.send(subscription.node, "down", subscription.deliver, message)

    def beat(self, node: Node, instance: Instance, ttl: float = TTL_S) -> None:
        """A heartbeat; ``ttl`` 0 takes the record back."""
        copy = Instance()
        copy.CopyFrom(instance)

        def spread() -> None:
            for other in self.nodes:
                if other.service == "router":
                    self.send(other, "down", other.registry.heard, copy, ttl)

        self.send(node, "up", spread)

    def call(self, instance: str, method: str, data: bytes, timeout: float, answer: Reply) -> None:
        """A call to whoever listens under that name, as the server gets it: none, one, or two that share it."""
        listening = [node for node in self.nodes if node.instance == instance and method in node.handlers]
        if not listening:
            answer(Unavailable(f"nobody listens on {instance}", reason="NO_RESPONDERS"))
        for node in listening:
            back = partial(self.send, node, "up", answer)
            self.send(node, "down", self._arrived, node, method, data, timeout, back)

    def _arrived(self, node: Node, method: str, data: bytes, timeout: float, answer: Reply) -> None:
        node.spawn(serve(node, method, data, timeout, answer))

    def forget(self, node: Node) -> None:
        """Its connection is gone, and all that the server did for it."""
        self.nodes.remove(node)
        for subscriptions in self.subscriptions.values():
            subscriptions[:] = [each for each in subscriptions if each.node is not node]


async def serve(node: Node, method: str, data: bytes, timeout: float, answer: Reply) -> None:  # noqa: ASYNC109  as Bus.call
    """One call in its process; every error that is not typed is a bug."""
    if method not in node.handlers:
        return  # it has just stopped listening
    try:
        async with asyncio.timeout(timeout):
            reply = await node.handlers[method](node.requests[method].FromString(data), None)
    except TimeoutError:
        answer(DeadlineExceeded(f"{method} was not done by its deadline"))
    except CountersignError as error:
        answer(CountersignError.from_status(error.to_status()))
    except Exception:
        answer(Internal(f"{method} failed"))
        raise
    else:
        answer(reply.SerializeToString())


class Subscription:
    def __init__(self, node: Node, subject: str, receive: Callable[[Msg], Coroutine[Any, Any, None]]) -> None:
        self.node, self.subject, self.receive = node, subject, receive

    def deliver(self, message: Msg) -> None:
        self.node.spawn(self.receive(message))


class SimBus:
    """As `services/runtime/bus.py` for one process, with that class's errors."""

    def __init__(self, network: Network, node: Node) -> None:
        self._network, self._node = network, node
        self._numbers = count()
        self.waiting: dict[int, asyncio.Future[Any]] = {}
        self.connected = True

    async def request(self, subject: str, data: bytes, headers: Mapping[str, str], timeout: float) -> Msg:  # noqa: ASYNC109
        replies = await self._ask(partial(self._network.handle, self._node, subject, data, headers), timeout)
        return cast(Msg, replies[0])

    async def request_many(self, subject: str, data: bytes, timeout: float, last: object) -> list[Msg]:  # noqa: ASYNC109
        replies = await self._ask(partial(self._network.handle, self._node, subject, data, {}), timeout)
        return cast(list[Msg], replies)

    async def publish(self, subject: str, data: bytes, headers: object) -> None:
        """For those who watch. In order and whole: that a connection loses some is for `services/sidecar`'s tests."""
        if not self.connected:
            raise Unavailable("no connection", reason="DISCONNECTED")
        if not (self._network.closed or self._node.dead):
            self._network.heard(data)

    async def flush(self, timeout: float = 5.0) -> None:  # noqa: ASYNC109
        await self._ask(lambda answer: answer(None), timeout)

    async def subscribe(self, subject: str, receive: Any) -> Subscription:
        subscription = Subscription(self._node, subject, receive)
        self._network.subscriptions.setdefault(subject, []).append(subscription)
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        listeners = self._network.subscriptions[subscription.subject]
        if subscription in listeners:
            listeners.remove(subscription)

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        reply: type[M],
        *,
        timeout: float,  # noqa: ASYNC109
        instance: str = "",
        traced: bool = True,
    ) -> M:
        if isinstance(request, DecodeRequest):  # the tokenizer is not what is simulated
            return cast(M, DecodeResponse(pieces=[f"{token} " for token in request.token_ids]))
        data = request.SerializeToString()
        return reply.FromString(await self._ask(partial(self._network.call, instance, method, data, timeout), timeout))

    def disconnect(self) -> None:
        """The connection breaks, with all that waits for an answer on it."""
        self.connected = False
        for future in self.waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the connection broke", reason="CONNECTION_LOST"))

    def connect(self) -> None:
        self.connected = True

    async def _ask(self, at_server: Callable[[Reply], None], timeout: float) -> Any:  # noqa: ASYNC109
        if not self.connected:
            raise Unavailable("no connection", reason="DISCONNECTED")
        number, future = next(self._numbers), self._network.loop.create_future()
        self.waiting[number] = future
        self._network.send(
            self._node, "up", at_server, partial(self._network.send, self._node, "down", self._hear, number)
        )
        try:
            async with asyncio.timeout(timeout):
                answer = await future
        except TimeoutError:
            raise DeadlineExceeded(f"no answer within {timeout:.3g} s") from None
        finally:
            del self.waiting[number]
        if isinstance(answer, CountersignError):
            raise answer
        return answer

    def _hear(self, number: int, answer: Any) -> None:
        future = self.waiting.get(number)
        if future is not None and not future.done():
            future.set_result(answer)
