"""Request and reply over NATS: protobuf messages, absolute deadlines, typed errors, bounded work.

A service listens on ``cs.v1.<service>.<Method>`` in a queue group, where one of its instances answers, and on
``cs.v1.<service>.<Method>.<instance>``. A reply is the bare message; an error is a ``google.rpc.Status`` under the
header ``Cs-Status: error``. Nothing waits without limit: every call has a timeout, ends at once when nobody listens or
the connection breaks, and the connection is retried for ever.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial

from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.errors import SlowConsumerError
from nats.js import JetStreamContext
from opentelemetry.trace import TracerProvider

from countersign.services.runtime.call import M, Method, parse_reply
from countersign.services.runtime.closing import Closing
from countersign.services.runtime.dispatch import DEADLINE_HEADER, STATUS_ERROR, STATUS_HEADER, Dispatcher, Limits
from countersign.services.runtime.errors import (
    CountersignError,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    Unavailable,
)
from countersign.services.runtime.inbox import Inbox
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.context import current_span

_log = logging.getLogger(__name__)
_RECONNECT_WAIT_S = 0.25
# Two unanswered pings end a connection whose peer is gone without a word.
_PING_INTERVAL_S = 5
_FLUSH_S = 1.0
_CLOSE_S = 1.0
# CPython 3.13.0 raises TypeError where a transport that lost its connection is written to.
_CLOSING_ERRORS = (TimeoutError, NatsError, OSError, TypeError)
_TOKEN = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Bus(Closing):
    """One connection to NATS. Made by `connect`; closed by `close`, or by ``async with``."""

    def __init__(self, url: str, provider: TracerProvider | None) -> None:
        self.dropped = 0  # messages lost because this process read too slowly
        self._url = url
        self._client = Client()
        self._closed = asyncio.Event()
        self._tracer = tracing.tracer(provider)
        self._serving: list[tuple[Dispatcher, list[Subscription]]] = []
        self._inbox = Inbox(self._client, url)

    @classmethod
    async def connect(
        cls,
        url: str,
        name: str,
        *,
        timeout: float = 10.0,  # noqa: ASYNC109  ends in a typed error
        tracer_provider: TracerProvider | None = None,
    ) -> Bus:
        """Connect, trying for ``timeout`` seconds.

        Args:
            url: one ``nats://host:port``, or several with commas between.
            name: what the server's monitoring shows.
            timeout: seconds.
            tracer_provider: the process's own by default.

        Raises:
            Unavailable: reason BUS_UNREACHABLE.
            InvalidArgument: reason BUS_ADDRESS_INVALID.
        """
        bus = cls(url, tracer_provider)
        try:
            async with asyncio.timeout(timeout):
                await bus._open(name)
        except NatsError as error:  # all else is tried again until the time is up
            raise InvalidArgument(f"{url!r} is no NATS address: {error}", reason="BUS_ADDRESS_INVALID") from None
        except TimeoutError:
            await bus.close()
            raise Unavailable(
                f"cannot connect to NATS at {url} within {timeout:g} s: {bus._client.last_error}",
                reason="BUS_UNREACHABLE",
                help="is nats-server up? `countersign up` starts one",
                url=url,
            ) from None
        return bus

    async def _open(self, name: str) -> None:
        await self._client.connect(
            self._url.split(","),
            name=name,
            error_cb=self._on_error,
            disconnected_cb=self._on_disconnect,
            reconnected_cb=self._on_reconnect,
            closed_cb=self._on_close,
            reconnect_time_wait=_RECONNECT_WAIT_S,  # type: ignore[arg-type]  # annotated int, used as seconds of any kind
            max_reconnect_attempts=-1,
            ping_interval=_PING_INTERVAL_S,
            # Without it a publish that meets a breaking connection with a full buffer waits for ever.
            flush_timeout=_FLUSH_S,
        )
        await self._inbox.open()

    async def close(self) -> None:
        """Stop serving, send what is written, disconnect. Takes a few seconds at most."""
        await self.stop_serving(0)
        try:
            if self._client.is_connected:
                await self.flush()
            async with asyncio.timeout(_CLOSE_S):
                await self._client.close()
        except (CountersignError, *_CLOSING_ERRORS) as error:
            _log.warning("the bus closes with messages unsent", extra={"error": repr(error)})
            await self._abandon()
        await self._on_close()  # nats-py leaves it out when the last bytes meet a broken connection

    async def _abandon(self) -> None:
        with suppress(*_CLOSING_ERRORS):
            async with asyncio.timeout(_CLOSE_S):
                await self._client.close()
        # nats-py is closed by then and has left its socket open if its last bytes could not be written.
        transport = self._client._transport  # noqa: SLF001  there is no public way to it
        if transport is not None:
            transport.close()  # type: ignore[no-untyped-call]  # nats-py leaves its annotation out
            await asyncio.sleep(0)  # the socket closes in the loop's next turn

    @property
    def server(self) -> tuple[str, str]:
        """The URL, without a password, and the version of the server at the other end."""
        url, version = self._client.connected_url, self._client.connected_server_version
        place = f"{url.scheme}://{url.hostname}:{url.port}" if url else ""
        return place, f"{version.major}.{version.minor}.{version.patch}"

    async def wait_closed(self) -> None:
        """Return when the connection is closed for good: by `close`, or by a server that refuses it."""
        await self._closed.wait()

    async def call(
        self,
        service: str,
        method: str,
        request: Message,
        reply: type[M],
        *,
        timeout: float,  # noqa: ASYNC109  travels as the deadline, ends in a typed error
        instance: str | None = None,
        traced: bool = True,
    ) -> M:
        """Ask a service, any instance or a certain one, and wait ``timeout`` seconds at most. Calls of which a request
        makes many are not ``traced``.

        Raises:
            Unavailable: reason NO_RESPONDERS, CONNECTION_LOST (the outcome is unknown), DISCONNECTED or BUS_CLOSED.
            DeadlineExceeded: no answer in time; the outcome is unknown.
            ResourceExhausted: reason PAYLOAD_TOO_LARGE, or the service is full.
            CountersignError: whatever the service answered.
        """
        subject = subject_of(service, method, instance)
        if timeout <= 0:
            raise DeadlineExceeded(f"no time is left to call {subject}", reason="EXPIRED_BEFORE_SENDING")
        headers = {DEADLINE_HEADER: str(int((time.time() + timeout) * 1000))}
        began_ns = time.time_ns()
        if traced:
            tracing.inject(headers, current_span())
        try:
            msg = await self._inbox.request(subject, request.SerializeToString(), headers, timeout)
        except CountersignError as error:
            if traced:
                about = tracing.rpc_attributes("nats", service, method)
                tracing.unanswered(self._tracer, f"{service}/{method}", about, began_ns, error)
            raise
        if msg.headers and msg.headers.get(STATUS_HEADER) == STATUS_ERROR:
            raise _peer_error(msg.data, subject)
        return parse_reply(reply, msg.data, subject)

    async def serve(
        self,
        service: str,
        instance: str,
        handlers: Mapping[str, Method],
        *,
        concurrency: int = 64,
        queue: int = 256,
    ) -> None:
        """Answer calls until `stop_serving`; returns once the server knows of the subscriptions.

        Args:
            service: its short name, such as ``tokenizer``.
            instance: this process's.
            handlers: unary methods by name.
            concurrency: calls that run at once.
            queue: calls that wait for their turn; more are answered ResourceExhausted at once.
        """
        dispatcher = Dispatcher(service, Limits(concurrency, queue), self.publish, self._tracer)
        subscriptions = []
        for name, method in handlers.items():
            accept = partial(dispatcher.accept, method=method)
            shared = await self._client.subscribe(subject_of(service, name, None), queue=service, cb=accept)
            direct = await self._client.subscribe(subject_of(service, name, instance), cb=accept)
            subscriptions += [shared, direct]
        self._serving.append((dispatcher, subscriptions))
        await self.flush()

    async def stop_serving(self, grace: float) -> None:
        """Take no more calls, give those in hand ``grace`` seconds, cancel the rest. Each is answered."""
        serving, self._serving = self._serving, []
        for _, subscriptions in serving:
            await self._drain(subscriptions)
        await asyncio.gather(*(dispatcher.stop(grace) for dispatcher, _ in serving))

    async def _drain(self, subscriptions: list[Subscription]) -> None:
        """End subscriptions so that each message is either handled here or offered to another instance.

        nats-py's own ``drain`` drops what comes between its PONG and the server's taking note.
        """
        try:
            for subscription in subscriptions:
                await self._client._send_unsubscribe(subscription._id)  # noqa: SLF001  unsubscribe() also stops reading
            await self.flush()
            async with asyncio.timeout(_CLOSE_S):
                for subscription in subscriptions:
                    while subscription.pending_msgs:  # noqa: ASYNC110  it offers no event
                        await asyncio.sleep(0)
        except (CountersignError, TimeoutError, NatsError):
            _log.warning("subscriptions end without the server's word")
        for subscription in subscriptions:
            await self.unsubscribe(subscription)

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str]) -> None:
        """Send one message to whoever listens. Raises as `Inbox.publish`."""
        await self._inbox.publish(subject, data, headers)

    async def request(self, subject: str, data: bytes, headers: Mapping[str, str], timeout: float) -> Msg:  # noqa: ASYNC109  ends in a typed error
        """One raw request and its reply, for JetStream's API. Raises as `Inbox.request`."""
        return await self._inbox.request(subject, data, headers, timeout)

    async def request_many(
        self,
        subject: str,
        data: bytes,
        timeout: float,  # noqa: ASYNC109  ends in a typed error
        last: Callable[[Msg], bool],
    ) -> list[Msg]:
        """One raw request and its many replies, up to the one that ``last`` accepts. Raises as `Inbox.request`."""
        return await self._inbox.request_many(subject, data, {}, timeout, last)

    async def subscribe(
        self, subject: str, receive: Callable[[Msg], Awaitable[None]], *, pending: int = 65_536
    ) -> Subscription:
        """Hand the messages on ``subject`` to ``receive``, one at a time; with ``pending`` waiting, more are dropped.

        Raises:
            Unavailable: reason BUS_CLOSED.
        """
        try:
            return await self._client.subscribe(subject, cb=receive, pending_msgs_limit=pending)
        except NatsError as error:
            raise Unavailable(f"cannot listen on {subject}: {error}", reason="BUS_CLOSED") from None

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription; does nothing when it has ended."""
        try:
            await subscription.unsubscribe()
        except NatsError:
            _log.debug("the subscription had ended", extra={"subject": subscription.subject})

    async def flush(self, timeout: float = _CLOSE_S) -> None:  # noqa: ASYNC109  ends in a typed error
        """Return when the server has taken all that was sent before, subscriptions too. Raises as `Inbox.flush`."""
        await self._inbox.flush(timeout)

    def jetstream(self) -> JetStreamContext:
        """JetStream's management API on this connection."""
        return self._client.jetstream()

    async def _on_error(self, error: Exception) -> None:
        if isinstance(error, SlowConsumerError):
            self.dropped += 1
            if self.dropped.bit_count() == 1:  # the 1st, 2nd, 4th, ...: a flood must not flood the log too
                _log.warning("messages dropped: this process reads too slowly", extra={"dropped": self.dropped})
        else:
            _log.debug("bus error", extra={"error": repr(error)})

    async def _on_disconnect(self) -> None:
        if not self._client.is_closed:
            _log.warning("connection to the bus lost, trying again", extra={"url": self._url})
        self._fail_waiting()

    async def _on_reconnect(self) -> None:
        _log.info("connection to the bus restored", extra={"url": self._url})

    async def _on_close(self) -> None:
        self._fail_waiting()
        self._closed.set()

    def _fail_waiting(self) -> None:
        self._inbox.fail_all(
            Unavailable(
                f"the connection to {self._url} broke while the answer was awaited",
                reason="CONNECTION_LOST",
                help="the call may have been carried out or not",
            )
        )


def subject_of(service: str, method: str, instance: str | None) -> str:
    """Where calls are sent.

    Raises:
        InvalidArgument: a part is empty, too long or holds what NATS would read as structure.
    """
    parts = [service, method] if instance is None else [service, method, instance]
    for part in parts:
        if not _TOKEN.fullmatch(part):
            raise InvalidArgument(f"{part!r} cannot be part of a subject: 1 to 64 of A-Z a-z 0-9 _ -")
    return ".".join(("cs.v1", *parts))


def _peer_error(data: bytes, subject: str) -> CountersignError:
    try:
        return CountersignError.from_status(status_pb2.Status.FromString(data))
    except DecodeError:
        return Internal(f"{subject} answered an error that cannot be read", reason="MALFORMED_REPLY")
