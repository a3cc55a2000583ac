"""Short HTTP requests to peers: bounded in time and size, no redirects, no proxy. Blocking, so called in a thread."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

from countersign.services.runtime.errors import Unavailable

TIMEOUT_S = 5.0
MAX_BYTES = 32 * 1024 * 1024
"""A bundle of 256 entries of 64 KiB, and something over."""


@dataclass(frozen=True, slots=True)
class Reply:
    """``status`` of HTTP, and the body."""

    status: int
    body: bytes


def ask(url: str, body: bytes | None = None, *, most: int = MAX_BYTES) -> Reply:
    """GET, or POST where there is a body. ``url``: http or https.

    Raises:
        Unavailable: reason PEER_UNREACHABLE: no connection in 5 s, no whole answer in 5 s more, or one of more than
            ``most`` bytes.
    """
    try:
        with _connected(url) as connection, _cut_off(connection) as late:
            parts = urlsplit(url)
            path = parts.path + (f"?{parts.query}" if parts.query else "")
            connection.request("GET" if body is None else "POST", path or "/", body)
            response = connection.getresponse()
            reply = Reply(response.status, response.read(most + 1))
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable(f"{url} does not answer: {error}", reason="PEER_UNREACHABLE", url=url) from None
    if late.is_set():
        raise Unavailable(f"{url} takes more than {TIMEOUT_S:g} s", reason="PEER_UNREACHABLE", url=url)
    if len(reply.body) > most:
        raise Unavailable(f"{url} answers more than {most} bytes", reason="PEER_UNREACHABLE", url=url)
    return reply


@contextlib.contextmanager
def _connected(url: str) -> Iterator[http.client.HTTPConnection]:
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.connect()
        yield connection


@contextlib.contextmanager
def _cut_off(connection: http.client.HTTPConnection) -> Iterator[threading.Event]:
    """Ends it after 5 s: a socket's own timeout is for each read, and a peer may send a byte at a time for ever."""
    late, peer = threading.Event(), connection.sock

    def cut() -> None:
        late.set()
        with contextlib.suppress(OSError):
            peer.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(TIMEOUT_S, cut)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
