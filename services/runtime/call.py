"""One call as its handler sees it, and the methods of a service as its descriptor lists them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from countersign.services.runtime.errors import Internal, InvalidArgument

M = TypeVar("M", bound=Message)
Transport = Literal["nats", "grpc"]


@dataclass(frozen=True, slots=True)
class Call:
    """What a handler may know about the call besides the request."""

    deadline_unix_ms: int
    transport: Transport

    def remaining(self) -> float:
        """Seconds until the deadline by this host's clock; 0 once it has passed."""
        return max(0.0, self.deadline_unix_ms / 1000 - time.time())


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC: its shape from the descriptor, and the bound method that answers it.

    ``function`` takes (request, Call); the request is an async iterator when ``client_streaming``. It returns an
    awaitable of the reply, or an async iterator of replies when ``server_streaming``.
    """

    name: str
    request_type: type[Message]
    reply_type: type[Message]
    client_streaming: bool
    server_streaming: bool
    function: Callable[[Any, Call], Any]

    @property
    def unary(self) -> bool:
        """Whether the bus can carry it."""
        return not (self.client_streaming or self.server_streaming)

    def encode(self, reply: object) -> bytes:
        """The bytes of a reply.

        Raises:
            Internal: reason WRONG_REPLY_TYPE: the handler returned something else.
        """
        if not isinstance(reply, self.reply_type):
            raise Internal(f"{self.name} returned {type(reply).__name__}", reason="WRONG_REPLY_TYPE")
        return reply.SerializeToString()


def methods_of(descriptor: ServiceDescriptor, service: object) -> tuple[Method, ...]:
    """The service's handlers, one for each RPC of the descriptor, found by name.

    Raises:
        TypeError: the service lacks one.
    """
    return tuple(_method(rpc, service) for rpc in descriptor.methods)


def _method(rpc: MethodDescriptor, service: object) -> Method:
    function = getattr(service, rpc.name, None)
    if not callable(function):
        raise TypeError(f"{type(service).__name__} does not define {rpc.full_name}")
    return Method(
        name=rpc.name,
        request_type=GetMessageClass(rpc.input_type),
        reply_type=GetMessageClass(rpc.output_type),
        client_streaming=rpc.client_streaming,
        server_streaming=rpc.server_streaming,
        function=function,
    )


def parse_request(kind: type[M], data: bytes) -> M:
    """The message that a peer sent.

    Raises:
        InvalidArgument: reason MALFORMED_REQUEST: no such message, or a string that is not UTF-8.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise InvalidArgument(
            f"these {len(data)} bytes are no {name}",
            reason="MALFORMED_REQUEST",
            help="strings must be UTF-8, and both sides must use the same version of the contract",
        ) from None


def parse_reply(kind: type[M], data: bytes, sender: str) -> M:
    """The message that ``sender`` answered.

    Raises:
        Internal: reason MALFORMED_REPLY.
    """
    try:
        return kind.FromString(data)
    except DecodeError:
        name = kind.DESCRIPTOR.full_name
        raise Internal(f"{sender} answered {len(data)} bytes that are no {name}", reason="MALFORMED_REPLY") from None
