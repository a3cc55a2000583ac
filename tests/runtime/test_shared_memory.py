"""Shared memory between processes: who gets it reads only, nobody can tear it, and it dies with its last user."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from countersign.services.runtime import shared_memory
from countersign.services.runtime.errors import CountersignError, FailedPrecondition, Unavailable
from countersign.services.runtime.shared_memory import ForeignMemory, Memory, MemoryClient, MemoryServer

SIZE = 3 * 4096
HOLDER = """
import sys, time
from countersign.services.runtime.shared_memory import Memory
memory = Memory(sys.argv[1], 1 << 20)
memory.view[:] = bytes([7]) * len(memory.view)
print("ready", flush=True)
time.sleep(600)
"""


@pytest.fixture
def name() -> str:
    return f"test-{os.urandom(4).hex()}"


@pytest_asyncio.fixture
async def server(name: str) -> AsyncIterator[MemoryServer]:
    memory = Memory("countersign-test", SIZE)
    server = MemoryServer(name, memory, itertools.count(1).__next__, most=2)
    server.start()
    yield server
    await server.stop()
    memory.close()


@pytest_asyncio.fixture
async def mine() -> AsyncIterator[Memory]:
    memory = Memory("countersign-test", SIZE)
    yield memory
    memory.close()


async def refused(call: object) -> CountersignError:
    with pytest.raises(CountersignError) as refusal:
        await call  # type: ignore[misc]
    return refusal.value


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110  the kernel tells one side only
            await asyncio.sleep(0)


async def test_both_sides_see_what_the_other_writes(server: MemoryServer, mine: Memory) -> None:
    client = await MemoryClient.connect(server.name, mine, 5)
    server._memory.view[100:105] = b"store"
    mine.view[7:13] = b"caller"
    session = server.session(client.session)
    assert session is not None
    assert bytes(client.theirs.view[100:105]) == b"store"
    assert bytes(session.memory.view[7:13]) == b"caller"
    assert client.alive
    client.close()


async def test_a_session_ends_with_its_caller(server: MemoryServer, mine: Memory) -> None:
    client = await MemoryClient.connect(server.name, mine, 5)
    client.close()
    await until(lambda: server.session(client.session) is None)


async def test_one_session_too_many_ends_the_oldest(server: MemoryServer, mine: Memory) -> None:
    clients = [await MemoryClient.connect(server.name, mine, 5) for _ in range(3)]
    await until(lambda: not clients[0].alive)
    assert [server.session(client.session) is not None for client in clients] == [False, True, True]
    for client in clients:
        client.close()


async def test_a_name_that_nobody_listens_on_is_a_typed_error(name: str, mine: Memory) -> None:
    assert (await refused(MemoryClient.connect(name, mine, 5))).reason == "NOT_ON_THIS_HOST"


async def test_a_server_that_does_not_answer_is_given_up(name: str, mine: Memory) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.bind(shared_memory._abstract(name))
        silent.listen(1)
        assert (await refused(MemoryClient.connect(name, mine, 0.01))).reason == "NOT_ON_THIS_HOST"


async def test_a_name_that_is_taken_is_refused(server: MemoryServer) -> None:
    second = MemoryServer(server.name, server._memory, itertools.count(1).__next__)
    with pytest.raises(FailedPrecondition) as refusal:
        second.start()
    assert refusal.value.reason == "ADDRESS_UNUSABLE"
    await second.stop()


async def test_another_users_process_is_refused(
    server: MemoryServer, mine: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(Unavailable) as refusal:
        await MemoryClient.connect(server.name, mine, 5)
    assert refusal.value.reason == "FOREIGN_PROCESS"


async def test_a_caller_that_sends_no_memory_gets_none_and_harms_nobody(server: MemoryServer, mine: Memory) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as rude:
        rude.connect(shared_memory._abstract(server.name))
        rude.sendall(b"x")
        rude.setblocking(False)
        async with asyncio.timeout(5):
            assert await asyncio.get_running_loop().sock_recv(rude, 1) == b""
    client = await MemoryClient.connect(server.name, mine, 5)
    assert client.alive
    client.close()


def test_memory_that_could_be_cut_shorter_is_not_mapped() -> None:
    fd = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    with pytest.raises(FailedPrecondition) as refusal:
        ForeignMemory(fd)
    assert refusal.value.reason == "UNSEALED_MEMORY"
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_nobody_but_its_maker_can_write_to_it_or_change_its_size() -> None:
    memory = Memory("countersign-test", SIZE)
    memory.view[0] = 1
    again = os.open(f"/proc/self/fd/{memory.fd}", os.O_RDWR)
    with pytest.raises(PermissionError):
        mmap.mmap(again, SIZE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(PermissionError):
        os.write(again, b"x")
    for size in (0, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(again, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(again, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    os.close(again)
    memory.close()


def test_the_memory_of_a_killed_process_is_gone_from_the_host(name: str) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, name], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "ready\n"
        assert f"memfd:{name}" in Path(f"/proc/{holder.pid}/maps").read_text()
        holder.send_signal(signal.SIGKILL)
    holders = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            holders += [maps] if f"memfd:{name}" in maps.read_text() else []
        except OSError:
            continue  # it ended meanwhile
    assert holders == []
    assert not list(Path("/dev/shm").glob(f"*{name}*"))
