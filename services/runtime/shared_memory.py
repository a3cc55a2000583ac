"""Shared memory that dies with its last user: memfds, and their way over a Unix socket.

A memfd has no name in any file system, so that nothing is left of it when a process is killed. One that is handed out
is sealed first: nobody can cut it shorter under a reader, and a reader cannot write to it, however it opens it. The
sockets are abstract for the same reason, and both sides look whose process the other is.

    caller -> store   one byte, with the caller's memfd
    store -> caller   16 bytes: number of the session, size of the arena; with the arena

The socket then stays open as long as both live; it carries nothing more.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import mmap
import os
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from countersign.services.runtime.errors import FailedPrecondition, Unavailable

_F_SEAL_FUTURE_WRITE = 0x0010  # Linux 5.1; Python 3.11 does not name it
_HELLO = struct.Struct("<QQ")
_PEER = struct.Struct("iII")
_BACKLOG = 64
_PAUSE_S = 0.5
_log = logging.getLogger(__name__)


class Memory:
    """``size`` bytes of shared memory that this process writes and others read.

    Pages take room once they are written. ``fd`` may be handed out: who gets it maps it for reading only.
    """

    def __init__(self, name: str, size: int) -> None:
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        self._map = mmap.mmap(self.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        self.size = size
        self.view = memoryview(self._map)

    def close(self) -> None:
        """Unmaps it; others keep it while they have it mapped."""
        with suppress(BufferError):  # a part is still being read: the map goes with it
            self.view.release()
            self._map.close()
        os.close(self.fd)


class ForeignMemory:
    """Another process's memory, mapped for reading.

    Raises:
        FailedPrecondition: reason UNSEALED_MEMORY: its owner could cut it shorter, which would kill who reads it.
    """

    def __init__(self, fd: int) -> None:
        try:
            _check_seals(fd)
            self.size = os.fstat(fd).st_size
            self._map = mmap.mmap(fd, self.size, mmap.MAP_SHARED, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise FailedPrecondition(f"memory that cannot be read safely: {error}", reason="UNSEALED_MEMORY") from None
        finally:
            os.close(fd)
        self.view = memoryview(self._map)

    def close(self) -> None:
        with suppress(BufferError):
            self.view.release()
            self._map.close()


@dataclass(slots=True)
class Session:
    """One caller: its memory, as long as its socket is open."""

    number: int
    memory: ForeignMemory


class MemoryServer:
    """Hands ``memory`` to callers on this host, and keeps what they hand in, by number of session.

    Args:
        name: of the socket; the kernel forgets it with the process.
        memory: what callers get.
        draw: numbers of sessions, which nobody can guess.
        most: sessions at once; one more takes the place of the oldest.
    """

    def __init__(self, name: str, memory: Memory, draw: Callable[[], int], *, most: int = 256) -> None:
        self.name = name
        self._memory = memory
        self._draw = draw
        self._most = most
        self._sessions: dict[int, Session] = {}
        self._ends: dict[int, asyncio.Task[None]] = {}
        self._socket = _unix_socket()
        self._accepting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Listens.

        Raises:
            FailedPrecondition: reason ADDRESS_UNUSABLE.
        """
        try:
            self._socket.bind(_abstract(self.name))
            self._socket.listen(_BACKLOG)
        except OSError as error:
            text = f"cannot listen on the Unix socket {self.name}: {error}"
            raise FailedPrecondition(text, reason="ADDRESS_UNUSABLE") from None
        self._accepting = asyncio.create_task(self._accept(), name="shared memory")

    async def stop(self) -> None:
        """Ends all sessions."""
        tasks = [*self._ends.values()] + ([self._accepting] if self._accepting is not None else [])
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._socket.close()

    def session(self, number: int) -> Session | None:
        """The session of this number, while it lasts."""
        return self._sessions.get(number)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                caller, _ = await loop.sock_accept(self._socket)
            except OSError as error:  # such as no file descriptor left: callers wait, or go without
                _log.warning("no caller gets shared memory now", extra={"error": str(error)})
                await asyncio.sleep(_PAUSE_S)
                continue
            while len(self._ends) >= self._most:
                self._ends.pop(next(iter(self._ends))).cancel()
            number = self._draw()
            self._ends[number] = asyncio.create_task(self._serve(number, caller))

    async def _serve(self, number: int, caller: socket.socket) -> None:
        """Exchanges memories, then waits until the caller goes."""
        memory = None
        try:
            with caller:
                check_peer(caller)
                _, fds = await _receive(caller, 1)
                memory = ForeignMemory(fds[0])
                self._sessions[number] = Session(number, memory)
                socket.send_fds(caller, [_HELLO.pack(number, self._memory.size)], [self._memory.fd])
                await asyncio.get_running_loop().sock_recv(caller, 1)
        except (OSError, FailedPrecondition, Unavailable):
            return  # whoever it was can do without: it finds the socket closed
        finally:
            self._sessions.pop(number, None)
            self._ends.pop(number, None)
            if memory is not None:
                memory.close()


class MemoryClient:
    """The other side: ``mine`` for what is handed in, ``theirs`` to read from. Made by `connect`."""

    def __init__(self, connection: socket.socket, mine: Memory, theirs: ForeignMemory, session: int) -> None:
        self._socket = connection
        self.mine = mine
        self.theirs = theirs
        self.session = session

    @classmethod
    async def connect(cls, name: str, mine: Memory, timeout: float) -> MemoryClient:  # noqa: ASYNC109  ends in a typed error
        """Exchanges memories with the server of this name; ``mine`` stays the caller's.

        Raises:
            Unavailable: reason NOT_ON_THIS_HOST: nobody listens, somebody else's process does, or it does not answer.
        """
        connection = _unix_socket()
        try:
            async with asyncio.timeout(timeout):
                await asyncio.get_running_loop().sock_connect(connection, _abstract(name))
                check_peer(connection)
                socket.send_fds(connection, [b"\0"], [mine.fd])
                data, fds = await _receive(connection, _HELLO.size)
            number, _ = _HELLO.unpack(data)
            return cls(connection, mine, ForeignMemory(fds[0]), number)
        except (OSError, TimeoutError, struct.error) as error:
            connection.close()
            text = f"no shared memory with {name}: {error}"
            raise Unavailable(text, reason="NOT_ON_THIS_HOST", help="bytes go by gRPC instead") from None
        except BaseException:
            connection.close()
            raise

    @property
    def alive(self) -> bool:
        """The server has not ended the session."""
        try:
            return self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        self._socket.close()
        self.theirs.close()


def check_peer(connection: socket.socket) -> None:
    """Raises Unavailable, reason FOREIGN_PROCESS: the other side is another user's process."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    _, user, _ = _PEER.unpack(data)
    if user != os.getuid():
        raise Unavailable(f"the process at the other end is user {user}'s", reason="FOREIGN_PROCESS")


def _check_seals(fd: int) -> None:
    if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        raise OSError("it is not sealed against shrinking")


async def _receive(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """``size`` bytes and one file descriptor. Raises OSError when they do not come."""
    await _readable(connection)
    data, fds, _, _ = socket.recv_fds(connection, size, 1, socket.MSG_CMSG_CLOEXEC)
    if len(data) != size or len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise OSError("the other side closed the socket, or sent something else")
    return data, list(fds)


async def _readable(connection: socket.socket) -> None:
    loop, ready = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _unix_socket() -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    made.setblocking(False)
    return made


def _abstract(name: str) -> str:
    return f"\0countersign/{name}"
