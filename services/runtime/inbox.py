"""Requests over NATS and their replies: one wildcard subscription, a place for each request that waits.

It stands in for nats-py's ``request``, which leaves a request that was under way when the connection broke waiting for
its whole timeout, and takes one reply only (a batched direct get sends many).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import (
    BadSubjectError,
    ConnectionClosedError,
    ConnectionDrainingError,
    OutboundBufferLimitError,
    StaleConnectionError,
)

from countersign.services.runtime.errors import (
    CountersignError,
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    Unavailable,
)
from countersign.services.runtime.jetstream import status_of

_NO_RESPONDERS = "503"


def wire_size(data: bytes, headers: Mapping[str, str]) -> int:
    """Bytes that the server counts against max_payload: NATS protocol, HPUB."""
    if not headers:
        return len(data)
    lines = sum(len(f"{key}: {value}\r\n".encode()) for key, value in headers.items())
    return len("NATS/1.0\r\n\r\n") + lines + len(data)


class Inbox:
    """Sends requests and hands their replies out. Made by `Bus.connect`; `open` once before use."""

    def __init__(self, client: Client, url: str) -> None:
        self._client = client
        self._url = url
        self._prefix = client.new_inbox()
        self._waiting: dict[str, asyncio.Queue[Msg | CountersignError]] = {}
        self._count = 0

    async def open(self) -> None:
        """Subscribe to the replies."""
        await self._client.subscribe(f"{self._prefix}.*", cb=self._receive)

    async def request(self, subject: str, data: bytes, headers: Mapping[str, str], timeout: float) -> Msg:  # noqa: ASYNC109  part of the contract, ends in a typed error
        """Send one request, return the one reply.

        Raises:
            Unavailable: reason NO_RESPONDERS, CONNECTION_LOST (the outcome is unknown), DISCONNECTED or BUS_CLOSED.
            DeadlineExceeded: no reply within ``timeout`` seconds.
            ResourceExhausted: reason PAYLOAD_TOO_LARGE; nothing was sent.
        """
        (reply,) = await self.request_many(subject, data, headers, timeout, last=lambda _: True)
        return reply

    async def request_many(  # the same, for APIs that answer in many messages
        self,
        subject: str,
        data: bytes,
        headers: Mapping[str, str],
        timeout: float,  # noqa: ASYNC109  as above
        last: Callable[[Msg], bool],
    ) -> list[Msg]:
        """Send one request, return its replies up to the one that ``last`` accepts. Raises as `request`."""
        deadline = asyncio.get_running_loop().time() + timeout
        received: list[Msg] = []
        with self._place() as (inbox, replies):
            try:
                async with asyncio.timeout_at(deadline):
                    await self.publish(subject, data, headers, reply=inbox)
                # A second scope: nats-py's publish swallows a cancellation that meets it at the wrong moment.
                async with asyncio.timeout_at(deadline):
                    while not received or not last(received[-1]):
                        received.append(_usable(await replies.get(), subject))
            except TimeoutError:
                text = f"no answer on {subject} within {timeout:.3g} s"
                raise DeadlineExceeded(text, subject=subject) from None
        return received

    async def flush(self, timeout: float) -> None:  # noqa: ASYNC109  ends in a typed error
        """Return when the server has taken all that was sent before, subscriptions too.

        A message to ourselves: nats-py's own ``flush`` sends its PING ahead of what is still buffered.

        Raises:
            Unavailable, DeadlineExceeded: as `request`.
        """
        with self._place() as (inbox, replies):
            try:
                async with asyncio.timeout(timeout):
                    await self.publish(inbox, b"", {})
                    _usable(await replies.get(), inbox)
            except TimeoutError:
                raise DeadlineExceeded(f"{self._url} did not answer within {timeout:.3g} s") from None

    @contextmanager
    def _place(self) -> Iterator[tuple[str, asyncio.Queue[Msg | CountersignError]]]:
        """A subject of our own, and where what comes on it goes."""
        self._count += 1
        token = str(self._count)
        replies: asyncio.Queue[Msg | CountersignError] = asyncio.Queue()
        self._waiting[token] = replies
        try:
            yield f"{self._prefix}.{token}", replies
        finally:
            del self._waiting[token]

    async def publish(self, subject: str, data: bytes, headers: Mapping[str, str], reply: str = "") -> None:
        """Send one message.

        Raises:
            Unavailable: reason DISCONNECTED (the buffer for the time without connection is full) or BUS_CLOSED.
            ResourceExhausted: reason PAYLOAD_TOO_LARGE. The server would close the connection for good.
        """
        size, limit = wire_size(data, headers), self._client.max_payload
        if size > limit:
            raise ResourceExhausted(
                f"a message of {size} bytes on {subject} is over the bus's limit of {limit}",
                reason="PAYLOAD_TOO_LARGE",
                help="send bulk over gRPC, and its reference over the bus",
                limit=str(limit),
            )
        task = asyncio.current_task()
        cancelling = task.cancelling() if task else 0
        try:
            await self._client.publish(subject, data, reply=reply, headers=dict(headers) or None)
        except (ConnectionClosedError, ConnectionDrainingError):
            raise Unavailable("the connection to the bus is closed", reason="BUS_CLOSED") from None
        except (OutboundBufferLimitError, StaleConnectionError):
            text, advice = f"no connection to {self._url}", "is nats-server up?"
            raise Unavailable(text, reason="DISCONNECTED", help=advice) from None
        except BadSubjectError:
            raise InvalidArgument(f"{subject!r} is no subject") from None
        if task and task.cancelling() > cancelling:
            raise asyncio.CancelledError  # swallowed by nats-py while it flushed

    def fail_all(self, error: CountersignError) -> None:
        """End every request that waits: its reply can no longer come."""
        for replies in self._waiting.values():
            replies.put_nowait(error)

    async def _receive(self, msg: Msg) -> None:
        replies = self._waiting.get(msg.subject.rpartition(".")[2])
        if replies is not None:
            replies.put_nowait(msg)


def _usable(reply: Msg | CountersignError, subject: str) -> Msg:
    if isinstance(reply, CountersignError):
        raise reply
    if status_of(reply) == _NO_RESPONDERS and not reply.data:
        raise Unavailable(
            f"nobody listens on {subject}",
            reason="NO_RESPONDERS",
            help="is the service up?",
            subject=subject,
        )
    return reply
