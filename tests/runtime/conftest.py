"""A real nats-server, connections to it, and a service whose handlers each test writes."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from countersign.services.runtime.bus import Bus
from countersign.services.runtime.call import Method, methods_of
from countersign.services.runtime.config import NatsConfig
from countersign.services.runtime.errors import Unimplemented
from countersign.services.runtime.journal import Journal
from countersign.services.runtime.nats_server import NatsServer
from countersign.v1 import kv_pb2

Connect = Callable[[], Awaitable[Bus]]


class KvService:
    """The kv contract (it has unary, client and server streaming methods) with the handlers given by name."""

    descriptor = kv_pb2.DESCRIPTOR.services_by_name["KvService"]

    def __init__(self, **handlers: Callable[..., Any]) -> None:
        async def unimplemented(request: object, call: object) -> object:
            raise Unimplemented("not in this test")

        for rpc in self.descriptor.methods:
            setattr(self, rpc.name, handlers.get(rpc.name, unimplemented))

    def unary(self) -> dict[str, Method]:
        return {method.name: method for method in methods_of(self.descriptor, self) if method.unary}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[NatsServer]:
    async with NatsServer(tmp_path) as server:
        yield server


@pytest.fixture
def frozen(server: NatsServer) -> Callable[[], AbstractContextManager[None]]:
    """``with frozen():`` the server takes bytes and does nothing with them."""

    @contextmanager
    def frozen() -> Iterator[None]:
        assert server.child is not None
        process = psutil.Process(server.child.pid)
        process.suspend()
        try:
            while any("State:\tT" not in status for status in thread_states(process.pid)):
                time.sleep(0.001)  # the signal reaches one thread after the other
            yield
        finally:
            if process.is_running():
                process.resume()

    return frozen


def thread_states(pid: int) -> list[str]:
    return [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/status")]


@pytest.fixture
async def connect(server: NatsServer) -> AsyncIterator[Connect]:
    """Opens connections; all are closed at the end."""
    opened: list[Bus] = []

    async def connect() -> Bus:
        opened.append(await Bus.connect(server.url, f"test-{len(opened)}"))
        return opened[-1]

    yield connect
    for bus in opened:
        await bus.close()


@pytest.fixture
async def bus(connect: Connect) -> Bus:
    return await connect()


@pytest.fixture
async def journal(bus: Bus) -> Journal:
    journal = Journal(bus, silence=0.1)
    await journal.ensure_streams(NatsConfig())
    return journal


@pytest.fixture
def kv() -> type[KvService]:
    return KvService
