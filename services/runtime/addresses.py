"""Where a process listens, and what it tells others of it."""

from __future__ import annotations

import socket

_WILDCARDS = frozenset({"0.0.0.0", "[::]"})  # noqa: S104  compared with, not bound to


def split(listen: str) -> tuple[str, int]:
    """The host, an IPv6 address without its brackets, and the port of ``host:port``."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def announced(listen: str, port: int) -> str:
    """host:port for others: this host's address in place of "any", and the port that was really taken."""
    host = listen.rpartition(":")[0]
    return f"{_own_address() if host in _WILDCARDS else host}:{port}"


def _own_address() -> str:
    return socket.gethostbyname(socket.gethostname())
