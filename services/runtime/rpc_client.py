"""Calling gRPC services by path, with typed errors and trace context."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterator
from contextlib import contextmanager

import grpc
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from opentelemetry.trace import TracerProvider

from countersign.services.runtime.call import M, parse_reply
from countersign.services.runtime.closing import Closing
from countersign.services.runtime.errors import CountersignError, DeadlineExceeded, Unavailable
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.tracing import Lasted

_MAX_MESSAGE_BYTES = 64 << 20
_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A service that was restarted is found again soon, not after minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Addresses come from the registry; a proxy for the internet cannot reach them.
    ("grpc.enable_http_proxy", 0),
)
# Of a channel for bulk: large frames, read in large pieces, cost both sides a fifth less.
_BULK_OPTIONS = (
    ("grpc.http2.max_frame_size", 4 << 20),
    ("grpc.experimental.tcp_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 256 << 10),
    ("grpc.experimental.tcp_max_read_chunk_size", 8 << 20),
)
_DETAILS_KEY = "grpc-status-details-bin"
# What grpc.aio reports in place of the server's status when a write meets the end of the call.
_WRITE_FAILED = "Internal error from Core"
_Headers = tuple[tuple[str, str], ...]


class Channel(Closing):
    """A connection to one server, made when first needed and again when it breaks.

    Method paths are ``/countersign.v1.TokenizerService/Encode``. Every call raises, besides what the server answers:

    - Unavailable: reason UNREACHABLE, naming the address.
    - DeadlineExceeded: no answer within ``timeout`` seconds.
    - Unavailable: reason STREAM_BROKEN: the server ended a client stream and its reason is lost.
    - ResourceExhausted: a message over 64 MiB.
    - Internal: reason MALFORMED_REPLY.

    ``bulk``: it carries messages of a megabyte and more.
    """

    def __init__(self, address: str, *, bulk: bool = False, tracer_provider: TracerProvider | None = None) -> None:
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS + (_BULK_OPTIONS if bulk else ()))
        self._tracer = tracing.tracer(tracer_provider)

    async def unary(self, method_path: str, request: Message, reply_type: type[M], timeout: float) -> M:  # noqa: ASYNC109  travels as the deadline
        """One request, one reply."""
        with self._calling(method_path, timeout) as headers:
            stub: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(method_path)
            data = await stub(request.SerializeToString(), timeout=timeout, metadata=headers)
            return parse_reply(reply_type, data, self._address)

    async def stream(
        self,
        method_path: str,
        request: Message,
        reply_type: type[M],
        timeout: float,  # noqa: ASYNC109  travels as the deadline
        lasted: Lasted | None = None,
    ) -> AsyncGenerator[M]:
        """One request, many replies. Closing the generator cancels the call."""
        with self._calling(method_path, timeout, lasted) as headers:
            stub: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(method_path)
            call = stub(request.SerializeToString(), timeout=timeout, metadata=headers)
            try:
                async for data in call:
                    yield parse_reply(reply_type, data, self._address)
            finally:
                call.cancel()

    async def put_stream(
        self,
        method_path: str,
        requests: AsyncIterable[Message],
        reply_type: type[M],
        timeout: float,  # noqa: ASYNC109  travels as the deadline
    ) -> M:
        """Many requests, one reply. What ``requests`` raises cancels the call and reaches the caller."""
        with self._calling(method_path, timeout) as headers:
            stub: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = self._channel.stream_unary(method_path)
            call = stub(timeout=timeout, metadata=headers)
            try:
                await _write_all(call, requests)
                return parse_reply(reply_type, await call, self._address)
            finally:
                call.cancel()

    async def close(self) -> None:
        """Cancel what is under way and disconnect."""
        await self._channel.close()

    @contextmanager
    def _calling(self, method_path: str, timeout: float, lasted: Lasted | None = None) -> Iterator[_Headers]:
        service, _, method = method_path.strip("/").partition("/")
        attributes = {**tracing.rpc_attributes("grpc", service, method), "server.address": self._address}
        with tracing.client_span(self._tracer, f"{service}/{method}", attributes, lasted) as span:
            if timeout <= 0:
                text = f"no time is left to call {method_path}"
                raise DeadlineExceeded(text, reason="EXPIRED_BEFORE_SENDING")
            headers: dict[str, str] = {}
            tracing.inject(headers, span)
            try:
                yield tuple(headers.items())
            except grpc.aio.AioRpcError as error:
                raise error_of(error, self._address) from None


async def _write_all(call: grpc.aio.StreamUnaryCall[bytes, bytes], requests: AsyncIterable[Message]) -> None:
    async for request in requests:
        try:
            await call.write(request.SerializeToString())
        except asyncio.InvalidStateError:
            return  # the server has ended the call: its status says why
    await call.done_writing()


def error_of(error: grpc.aio.AioRpcError, address: str) -> CountersignError:
    """The typed form of a gRPC failure, with or without a ``google.rpc.Status`` in it."""
    code = error.code()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes) and (typed := _typed(value, code)):
            return typed
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unavailable(
            f"no service answers at {address}: {error.details()}",
            reason="UNREACHABLE",
            help="is it up, and is the address right?",
            address=address,
        )
    if code is grpc.StatusCode.INTERNAL and error.details() == _WRITE_FAILED:
        return Unavailable(
            f"{address} ended the call before everything was sent",
            reason="STREAM_BROKEN",
            help="the call may have been carried out or not",
            address=address,
        )
    number = int(code.value[0])
    return CountersignError.from_status(status_pb2.Status(code=number, message=f"{address}: {error.details()}"))


def _typed(data: bytes, code: grpc.StatusCode) -> CountersignError | None:
    try:
        status = status_pb2.Status.FromString(data)
    except DecodeError:
        return None
    return CountersignError.from_status(status) if status.code == code.value[0] else None
