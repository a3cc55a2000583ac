"""gRPC hosting from a service descriptor: typed errors, deadlines, health, reflection."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status
from opentelemetry.trace import Span, Tracer, TracerProvider

from countersign.services.runtime.addresses import announced
from countersign.services.runtime.call import Call, Method, methods_of, parse_request
from countersign.services.runtime.errors import (
    CountersignError,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    ResourceExhausted,
)
from countersign.services.runtime.telemetry import tracing
from countersign.services.runtime.telemetry.context import bind_request, request_of

MAX_MESSAGE_BYTES = 64 << 20
# For a caller that names no deadline.
DEFAULT_TIMEOUT_S = 3600.0
_DRAIN_S = 1.0
_CANCELLATION_S = 0.002

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Otherwise a second process may take the same port, and each gets some of the calls.
    ("grpc.so_reuseport", 0),
)
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Context = grpc.aio.ServicerContext[Any, Any]


class Described(Protocol):
    """A service: its descriptor, and a method for each of its RPCs."""

    descriptor: ServiceDescriptor


class RpcServer:
    """One gRPC server. ``add`` services, then ``start``.

    Args:
        listen: host:port; port 0 takes a free one.
        max_concurrent: calls at once over all services; more are answered ResourceExhausted. Health and reflection do
            not count, so that a busy server does not look dead.
        tracer_provider: the process's own by default.
    """

    def __init__(
        self, listen: str, *, max_concurrent: int = 1024, tracer_provider: TracerProvider | None = None
    ) -> None:
        self._listen = listen
        self._server = grpc.aio.server(options=_OPTIONS)
        self._health = health.aio.HealthServicer()
        self._names: list[str] = []
        self._gate = _Gate(max_concurrent)
        self._tracer = tracing.tracer(tracer_provider)

    def add(self, service: Described) -> None:
        """Serve a service. Before `start`.

        Raises:
            TypeError: it lacks a method of its descriptor.
        """
        name = service.descriptor.full_name
        handlers = {
            method.name: _rpc_handler(_Guard(name, method, self._gate, self._tracer))
            for method in methods_of(service.descriptor, service)
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(name, handlers),))
        self._names.append(name)

    async def start(self, *, serving: bool = True) -> str:
        """Listen; returns the address for others, host:port.

        Raises:
            FailedPrecondition: reason ADDRESS_UNUSABLE.
        """
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        await self.set_serving(serving)
        try:
            port = self._server.add_insecure_port(self._listen)
        except RuntimeError as error:
            raise FailedPrecondition(
                f"cannot listen on {self._listen}: {error}",
                reason="ADDRESS_UNUSABLE",
                help="choose another address, or port 0 for any free one",
                listen=self._listen,
            ) from None
        await self._server.start()
        return announced(self._listen, port)

    async def set_serving(self, serving: bool) -> None:
        """Set the health of each service and of the whole."""
        states = health_pb2.HealthCheckResponse
        for name in ("", *self._names):
            await self._health.set(name, states.SERVING if serving else states.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Turn unhealthy, take no more calls, give those in hand ``grace`` seconds, cancel the rest."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace)


class _Gate:
    """Counts the calls in hand."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._inside = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        if self._inside >= self._limit:
            text = f"the server has {self._inside} calls in hand"
            raise ResourceExhausted(text, reason="OVERLOADED", help="try again later")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


@dataclass(frozen=True, slots=True)
class _Guard:
    """Runs one method's calls: whatever happens inside, the caller gets a typed error."""

    service: str
    method: Method
    gate: _Gate
    tracer: Tracer

    async def unary(self, data: bytes, context: _Context) -> bytes:
        async def body(call: Call) -> bytes:
            return self.method.encode(await self.method.function(self._parse(data), call))

        return await self._run(context, body)

    async def client_stream(self, requests: AsyncIterator[bytes], context: _Context) -> bytes:
        async def body(call: Call) -> bytes:
            try:
                reply = self.method.encode(await self.method.function(self._parse_each(requests), call))
            except Exception:
                await _drain(requests)
                raise
            await _drain(requests)
            return reply

        return await self._run(context, body)

    async def server_stream(self, data: bytes, context: _Context) -> None:
        async def body(call: Call) -> None:
            await self._write_all(self.method.function(self._parse(data), call), context)

        await self._run(context, body)

    async def both_stream(self, requests: AsyncIterator[bytes], context: _Context) -> None:
        async def body(call: Call) -> None:
            await self._write_all(self.method.function(self._parse_each(requests), call), context)

        await self._run(context, body)

    def _parse(self, data: bytes) -> Message:
        request = parse_request(self.method.request_type, data)
        bind_request(request_of(request))  # each call has a task of its own
        _log.debug("a call is taken", extra={"method": f"{self.service}/{self.method.name}"})
        return request

    async def _parse_each(self, requests: AsyncIterator[bytes]) -> AsyncIterator[Message]:
        async for data in requests:
            yield self._parse(data)
        # When the caller goes away, grpc.aio ends the iterator as if all had come, and cancels this task just after.
        await asyncio.sleep(_CANCELLATION_S)

    async def _write_all(self, replies: Any, context: _Context) -> None:
        # A handler is an async generator as a rule, whose cleanup must run before the call ends.
        closing = contextlib.aclosing(replies) if hasattr(replies, "aclose") else contextlib.nullcontext()
        async with closing:
            async for reply in replies:
                await context.write(self.method.encode(reply))

    async def _run(self, context: _Context, body: Callable[[Call], Awaitable[_T]]) -> _T:
        with self._span(context) as span:
            try:
                with self.gate.admit():
                    return await self._within_deadline(_call(context), body)
            except CountersignError as error:
                failure = error
            except Exception as error:  # noqa: BLE001  whatever a handler raises must be logged and answered
                failure = self._bug(error, context)
            tracing.record_error(span, failure)
        return await context.abort_with_status(rpc_status.to_status(failure.to_status()))

    async def _within_deadline(self, call: Call, body: Callable[[Call], Awaitable[_T]]) -> _T:
        try:
            async with asyncio.timeout(call.remaining()) as scope:
                return await body(call)
        except TimeoutError:
            if not scope.expired():
                raise  # the handler's own
            raise DeadlineExceeded(f"{self.method.name} was not done by its deadline") from None

    def _bug(self, error: Exception, context: _Context) -> Internal:
        name = f"{self.service}/{self.method.name}"
        if context.cancelled():  # the caller went away in the middle of a read or write
            _log.debug("a cancelled call failed", extra={"method": name, "error": repr(error)})
        else:
            _log.error("a handler failed", exc_info=error, extra={"method": name})
        return Internal(f"{name} failed: a bug, see the server's log")

    def _span(self, context: _Context) -> AbstractContextManager[Span]:
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        attributes = tracing.rpc_attributes("grpc", self.service, self.method.name)
        return tracing.server_span(self.tracer, f"{self.service}/{self.method.name}", attributes, carrier)


async def _drain(requests: AsyncIterator[bytes]) -> None:
    """Take what the client still sends: grpc.aio's client loses the status of a call that ends while it writes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_S):
            async for _ in requests:
                pass


def _rpc_handler(guard: _Guard) -> grpc.RpcMethodHandler[Any, Any]:
    # Without deserializer: gRPC's answer to bytes that are no message would be a bare INTERNAL.
    match guard.method.client_streaming, guard.method.server_streaming:
        case False, False:
            return grpc.unary_unary_rpc_method_handler(guard.unary)
        case False, True:
            return grpc.unary_stream_rpc_method_handler(guard.server_stream)
        case True, False:
            return grpc.stream_unary_rpc_method_handler(guard.client_stream)
        case _:
            return grpc.stream_stream_rpc_method_handler(guard.both_stream)


def _call(context: _Context) -> Call:
    remaining: float | None = context.time_remaining()  # None without deadline, whatever the stubs say
    timeout = DEFAULT_TIMEOUT_S if remaining is None else min(remaining, DEFAULT_TIMEOUT_S)
    return Call(int((time.time() + timeout) * 1000), "grpc")
