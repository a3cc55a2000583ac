"""What a microservice looks like to the runtime, and what the runtime hands to it.

A service is a class with one method for each RPC of its descriptor, by the RPC's name::

    async def Encode(self, request: EncodeRequest, call: Call) -> EncodeResponse        # unary: on NATS and gRPC
    def Generate(self, request, call) -> AsyncIterator[GenerateResponse]                # server streaming: gRPC only
    async def Put(self, requests: AsyncIterator[PutRequest], call: Call) -> PutResponse  # client streaming: gRPC only

A handler raises CountersignError for what the caller should know; anything else is a bug, logged with its traceback and
answered as Internal. It is cancelled at the call's deadline, and over gRPC when the caller goes away.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from google.protobuf.descriptor import ServiceDescriptor

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import Call, Method, methods_of
from countersign.services.runtime.config import Config
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.registry import Registry
from countersign.v1.registry_pb2 import Instance

__all__ = ["Call", "Context", "Create", "Method", "Service", "methods_of"]


class Service(Protocol):
    """One microservice, besides its handlers."""

    descriptor: ServiceDescriptor

    async def run(self) -> None:
        """Work in the background; may return at once or never. An exception ends the process with code 1."""

    async def close(self) -> None:
        """Give resources back. Called once, after the last handler has ended."""

    def describe(self, instance: Instance) -> None:
        """Fill in its part of the registry record (model, active_requests); called before each heartbeat."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a service is made from."""

    config: Config
    bus: Bus
    journal: Journal
    registry: Registry
    name: str  # such as "tokenizer"
    instance: str  # such as "tokenizer-1f2e3d4c", unique for this run of the process
    address: Callable[[], str]  # its gRPC server's host:port; raises FailedPrecondition until it listens
    log: logging.Logger


Create = Callable[[Context], Awaitable[Service]]
